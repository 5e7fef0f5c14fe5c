"""Completions in OpenAI's format."""

from collections.abc import Iterable, Iterator
from typing import Any

from server.api.generation.answer import ChoiceDelta
from server.api.generation.shape import TurnShape, usage_fields
from server.api.schemas.completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from server.api.sse import EventData
from server.engine.messages import Token


class CompletionShape(TurnShape[CompletionRequest]):
    """`Completion` objects."""

    id_prefix = "cmpl"

    def opening(self) -> Iterator[Completion]:
        """The prompts, unless they are sent with log-probabilities later."""
        if self.body.echo and not self.body.scores_prompt:
            for index, text in enumerate(self.answer.echoes):
                yield self._event(ChoiceDelta(index, text), self._prompt_ids(index))
        elif self.body.return_token_ids:
            for index in range(len(self.answer.choices)):
                yield self._event(ChoiceDelta(index), self._prompt_ids(index))

    def pieces(self, delta: ChoiceDelta) -> Iterable[EventData]:
        """At most one event."""
        if delta.is_prompt:
            logprobs = self._logprobs(delta.tokens, delta.offsets)
            text = self.answer.echoes[delta.choice]
            return [self._event(delta._replace(text=text), {"logprobs": logprobs})]
        if delta.reason is not None:
            return [self._event(delta, self._token_fields(delta.tokens, delta.offsets))]
        if not delta.text and not delta.tokens:
            return []
        if self._is_plain:
            return [self.render_text(delta.choice, delta.text, self._text_event)]
        return [self._event(delta, self._token_fields(delta.tokens, delta.offsets))]

    def closing(self) -> Iterator[Completion]:
        """The usage, if requested."""
        if self.body.wants_usage_event:
            yield self._completion([], usage=self.answer.usage)

    def whole(self) -> Completion:
        """All returned choices."""
        return self._completion(
            [self._whole_choice(index, at) for index, at in enumerate(self._returned_choices())],
            usage=self.answer.usage,
            session_id=self.answer.session_id,
            session_turn=self.answer.session_turn,
        )

    @classmethod
    def replay_pieces(cls, known: str, body: CompletionRequest) -> Iterator[Completion]:
        """One event with everything."""
        answer = Completion.model_validate_json(known)
        facts = answer.model_dump(exclude={"usage"}, exclude_unset=True)
        yield Completion.model_validate(facts | usage_fields(body, answer.usage))
        if body.wants_usage_event:
            yield answer.model_copy(update={"choices": []})

    def _returned_choices(self) -> Iterator[int]:
        """The returned choices: the best of each prompt, as many as requested.

        In their original order if all are returned.
        """
        made, kept = self.body.num_generated_per_prompt, self.body.num_choices_per_prompt
        choices = self.answer.choices
        for start in range(0, len(choices), made):
            of_prompt = range(start, start + made)
            if kept == made:
                yield from of_prompt
            else:
                yield from sorted(of_prompt, key=lambda at: -choices[at].mean_logprob)[:kept]

    def _whole_choice(self, index: int, at: int) -> CompletionChoice:
        choice = self.answer.choices[at]
        placed = choice.generated
        fields = self._token_fields(placed.tokens, placed.offsets) | self._prompt_ids(at)
        if self.body.scores_prompt:
            tokens = [*choice.prompt.tokens, *placed.tokens]
            offsets = [*choice.prompt.offsets, *placed.offsets]
            fields["logprobs"] = self._logprobs(tokens, offsets)
        return CompletionChoice(
            index=index,
            text=self.answer.echoes[at] + "".join(choice.text),
            finish_reason=choice.reason,
            stop_reason=choice.stopped_by,
            **({"logprobs": None} | fields),
        )

    def _text_event(self, index: int, text: str) -> Completion:
        """An event with only text."""
        return self._event(ChoiceDelta(index, text), {})

    def _event(self, delta: ChoiceDelta, fields: dict[str, Any]) -> Completion:
        """One event of a stream."""
        fields = {"logprobs": None} | fields
        if delta.reason is not None:
            fields["stop_reason"] = delta.stopped_by
        choice = CompletionChoice(
            index=delta.choice, text=delta.text, finish_reason=delta.reason, **fields
        )
        return self._completion([choice], **usage_fields(self.body, delta.usage or self._usage))

    def _completion(self, choices: list[CompletionChoice], **fields: object) -> Completion:
        """A completion object with these choices."""
        return Completion.model_validate(
            self.facts | {"object": "text_completion", "choices": choices} | fields
        )

    def _prompt_ids(self, index: int) -> dict[str, object]:
        if not self.body.return_token_ids:
            return {}
        return {"prompt_token_ids": list(self.answer.choices[index].prompt_ids)}

    def _token_fields(self, tokens: Iterable[Token], offsets: Iterable[int]) -> dict[str, Any]:
        """The requested details of these tokens."""
        tokens, fields = list(tokens), dict[str, Any]()
        if self.body.logprobs is not None:
            fields["logprobs"] = self._logprobs(tokens, offsets)
        if self.body.return_token_ids:
            fields["token_ids"] = [token.token_id for token in tokens]
        return fields

    def _logprobs(self, tokens: Iterable[Token], offsets: Iterable[int]) -> CompletionLogprobs:
        tokens = list(tokens)
        return CompletionLogprobs.model_construct(  # not validated: there may be many
            tokens=[self._name(token.token_id) for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[self._top(token) for token in tokens] if self.body.logprobs else None,
            text_offset=list(offsets),
        )

    def _top(self, token: Token) -> dict[str, float] | None:
        """Log-probabilities of the most probable tokens and of the token itself, by name."""
        if token.logprob is None:
            return None
        named, name_of = dict[str, float](), self._name
        for token_id, logprob in token.top:  # the most probable first
            named.setdefault(name_of(token_id), logprob)
        own = name_of(token.token_id)
        named[own] = max(token.logprob, named.get(own, token.logprob))
        return named

    def _name(self, token_id: int) -> str:
        """A token's name in the older API: its text, or its bytes."""
        text = self.tokenizer.whole_texts.get(token_id)
        if text is not None:
            return text or self.tokenizer.name_of(token_id)
        parts = self.tokenizer.bytes_of(token_id)
        if not parts:
            return self.tokenizer.name_of(token_id)
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in parts)
