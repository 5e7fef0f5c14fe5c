"""From a request's thinking options to whether its answer begins with thoughts, and their limit."""

from server.api.schemas.generation import SamplingRequest
from server.api.service import Service
from server.engine.messages import ThinkingBudget
from server.errors import InvalidRequest

EFFORTS = {
    **{"none": 0, "minimal": 128, "low": 1024, "medium": 4096},
    **dict.fromkeys(("high", "xhigh", "max")),
}
"""Maximum tokens of thoughts per effort; None: no limit."""


def read_thinking(
    service: Service, body: SamplingRequest, *, has_grammar: bool
) -> tuple[bool | None, ThinkingBudget | None]:
    """Whether the answer begins with thoughts (None: the template's default), and their limit.

    Raises InvalidRequest for a model that does not think, and for contradictory options.
    """
    asked = dict[str, bool]()
    if body.effort is not None:
        asked[body.effort_name] = body.effort != "none"
    if body.enables_thinking is not None:
        asked["chat_template_kwargs.enable_thinking"] = body.enables_thinking
    if body.thinking_budget is not None:
        asked["thinking_token_budget"] = body.thinking_budget > 0
    wishing = next((name for name, wish in asked.items() if wish), None)
    conversation = service.conversation
    if conversation is None or conversation.rules.thinking is None:
        if wishing is not None:
            why = "this server's model does not think before it answers"
            raise InvalidRequest(why, wishing, "unsupported_parameter")
        return None, None
    refusing = next((name for name, wish in asked.items() if not wish), None)
    if wishing is not None and refusing is not None:
        raise InvalidRequest(f"{wishing} and {refusing} contradict each other", wishing)
    if wishing is not None and has_grammar:
        raise InvalidRequest("structured output cannot be combined with thinking", wishing)
    if wishing is None:
        if has_grammar and body.is_chat:  # thoughts would break the grammar: start the text at once
            usual = conversation.splitter(None)
            return False if usual is not None and usual.is_thinking else None, None
        return None if refusing is None else False, None
    limit = body.thinking_budget
    if limit is None and body.effort is not None:
        limit = EFFORTS[body.effort]
    if limit is None:
        return True, None
    close = conversation.rules.thinking.close
    ids = tuple(service.checkpoint.tokenizer.encode("\n" + close))
    return True, ThinkingBudget(limit, close.encode(), ids)
