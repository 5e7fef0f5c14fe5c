"""`POST /v1/completions`: text that continues a prompt, whole or as a stream."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request, Response

from server.api import prompts
from server.api.answers import Answer, Choice, PlacedTokens, new_id
from server.api.auth import CallerDep
from server.api.exchange import TOLD, Exchange, Prepared, SessionHeaders
from server.api.parameters import IdempotencyKey, SessionHeader
from server.api.refusals import GUARDED, JSON, TURN, refusals
from server.api.schemas.completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from server.api.service import Service, ServiceDep
from server.api.sse import Message, events_of
from server.api.turns import ChoiceSpec, Told, Turn
from server.engine.messages import Finished, PromptScored, TextDelta, Token

router = APIRouter(tags=["completions"], responses=refusals(*GUARDED))


@router.post(
    "/v1/completions",
    response_model=Completion,
    responses=refusals(*JSON, 409, *TURN) | {200: TOLD | events_of("Completion")},
)
async def create_completion(
    body: CompletionRequest,
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    x_session_id: SessionHeader = None,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Continue a prompt. With a session, continue what it has read and written so far.

    A turn of a session is committed before its last event; a turn that ends in any other way
    leaves the session as it was. With an `Idempotency-Key`, a turn that was committed is not taken
    again: the same request gets the same answer, for as long as the turn's checkpoint is kept.
    Without a session nothing could be done twice, and the key has no effect.
    """

    async def prepare(turn: Turn) -> Prepared:
        tokens = await prompts.read_prompts(service, body, turn.start)
        specs = await prompts.choices(service, body, tokens)
        return Prepared(specs, CompletionAnswer(service, body, turn, specs))

    given = SessionHeaders(x_session_id, idempotency_key)
    return await Exchange(request, service, caller, body, given).answer(
        prepare, lambda known: _again(known, body)
    )


class CompletionAnswer(Answer):
    """A completion in OpenAI's shape."""

    def __init__(
        self, service: Service, body: CompletionRequest, turn: Turn, specs: Sequence[ChoiceSpec]
    ) -> None:
        decode = service.checkpoint.tokenizer.decode
        self._echoes = [decode(spec.token_ids) if body.echo else "" for spec in specs]
        super().__init__(service, body, turn, specs, answer_id=new_id("cmpl"), echoes=self._echoes)
        self._asked = body
        self._is_plain = (
            body.logprobs is None and not body.return_token_ids and not body.wants_usage_in_events
        )

    def opening(self) -> Iterator[Completion]:
        """The prompts, unless their probabilities are to come with them."""
        if self._asked.echo and not self._scores_prompt:
            for index, text in enumerate(self._echoes):
                yield self._piece(index, text, self._prompt_ids(index))
        elif self._asked.return_token_ids:
            for index in range(len(self.choices)):
                yield self._piece(index, "", self._prompt_ids(index))

    def pieces(self, index: int, event: Told) -> Iterable[Message]:
        """At most one event."""
        if not self._is_plain or not isinstance(event, TextDelta):
            return self._full_pieces(index, event)
        return [self._rendered(index, event.text, self._text_piece)] if event.text else []

    def _full_pieces(self, index: int, event: Told) -> Iterator[Completion]:
        choice = self.choices[index]
        if isinstance(event, PromptScored):
            logprobs = self._logprobs(choice.prompt, len(event.tokens))
            yield self._piece(index, self._echoes[index], {"logprobs": logprobs})
            return
        facts = self._told(choice, len(event.tokens))
        if isinstance(event, Finished):
            yield self._piece(
                index, event.text, facts | {"stop_reason": event.stopped_by}, event.reason
            )
        elif event.text or event.tokens:
            yield self._piece(index, event.text, facts)

    def closing(self) -> Iterator[Completion]:
        """The usage, if asked for."""
        if self._asked.wants_usage_event:
            yield self._completion([], usage=self.usage)

    def whole(self) -> Completion:
        return self._completion(
            [self._whole_choice(index, at) for index, at in enumerate(self._chosen())],
            usage=self.usage,
            session_id=self.session_id,
            session_turn=self.session_turn,
        )

    @property
    def _scores_prompt(self) -> bool:
        return bool(self._asked.echo) and self._asked.logprobs is not None

    def _chosen(self) -> Iterator[int]:
        """The choices that are answered with: of each prompt the best, as many as were asked for.

        Where all are, in their order.
        """
        made, kept = self._asked.num_generated_per_prompt, self._asked.num_choices_per_prompt
        for start in range(0, len(self.choices), made):
            of_prompt = range(start, start + made)
            if kept == made:
                yield from of_prompt
            else:
                best_first = sorted(of_prompt, key=lambda at: -self.choices[at].mean_logprob)
                yield from best_first[:kept]

    def _whole_choice(self, index: int, at: int) -> CompletionChoice:
        choice = self.choices[at]
        facts = self._told(choice, len(choice.generated.tokens)) | self._prompt_ids(at)
        if self._scores_prompt:
            prompt = self._logprobs(choice.prompt, len(choice.prompt.tokens))
            facts["logprobs"] = _joined(prompt, facts.get("logprobs"))
        return CompletionChoice(
            index=index,
            text=self._echoes[at] + "".join(choice.text),
            finish_reason=choice.reason,
            stop_reason=choice.stopped_by,
            **({"logprobs": None} | facts),
        )

    def _piece(
        self,
        index: int,
        text: str,
        facts: dict[str, Any],
        reason: Literal["stop", "length"] | None = None,
    ) -> Completion:
        """One event of a stream."""
        told = {"logprobs": None} | facts
        choice = CompletionChoice(index=index, text=text, finish_reason=reason, **told)
        return self._completion([choice], **self._asked.usage_in_event(lambda: self.usage))

    def _text_piece(self, index: int, text: str) -> Completion:
        """An event that tells a text and nothing else."""
        return self._piece(index, text, {})

    def _completion(self, choices: list[CompletionChoice], **facts: object) -> Completion:
        """A completion object with these choices."""
        return Completion.model_validate(
            self.facts | {"object": "text_completion", "choices": choices} | facts
        )

    def _prompt_ids(self, index: int) -> dict[str, object]:
        if not self._asked.return_token_ids:
            return {}
        return {"prompt_token_ids": list(self.choices[index].prompt_ids)}

    def _told(self, choice: Choice, num_new: int) -> dict[str, Any]:
        """What was asked for about the last `num_new` tokens of a choice."""
        facts: dict[str, Any] = {}
        if self._asked.logprobs is not None:
            facts["logprobs"] = self._logprobs(choice.generated, num_new)
        if self._asked.return_token_ids:
            facts["token_ids"] = choice.ids[len(choice.ids) - num_new :]
        return facts

    def _logprobs(self, placed: PlacedTokens, num_new: int) -> CompletionLogprobs:
        """Of the last `num_new` tokens."""
        first = len(placed.tokens) - num_new
        tokens = placed.tokens[first:]
        return CompletionLogprobs(
            tokens=[self._name(token.token_id) for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[self._top(token) for token in tokens] if self._asked.logprobs else None,
            text_offset=placed.offsets[first:],
        )

    def _top(self, token: Token) -> dict[str, float] | None:
        """The most probable tokens and the token itself, by name."""
        if token.logprob is None:
            return None
        named = dict[str, float]()
        for token_id, logprob in (*token.top, (token.token_id, token.logprob)):
            name = self._name(token_id)
            named[name] = max(logprob, named.get(name, logprob))
        return named

    def _name(self, token_id: int) -> str:
        """A token in the older API: its text, or else its bytes."""
        text = self.tokenizer.bytes_of(token_id)
        try:
            return text.decode() if text else self.tokenizer.name_of(token_id)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


def _joined(first: CompletionLogprobs, second: object) -> CompletionLogprobs:
    if not isinstance(second, CompletionLogprobs):
        return first
    tops = None
    if first.top_logprobs is not None and second.top_logprobs is not None:
        tops = first.top_logprobs + second.top_logprobs
    return CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=tops,
        text_offset=first.text_offset + second.text_offset,
    )


def _again(answer: str, body: CompletionRequest) -> Iterator[Completion]:
    """A known answer as a stream."""
    known = Completion.model_validate_json(answer)
    facts = known.model_dump(exclude={"usage"}, exclude_unset=True)
    yield Completion.model_validate(facts | body.usage_in_event(lambda: known.usage))
    if body.wants_usage_event:
        yield known.model_copy(update={"choices": []})
