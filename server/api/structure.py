"""Structured output: from a request's parameters to a compiled grammar."""

import json

from model.decoding.grammar import Grammar, GrammarBusyError, GrammarError, GrammarSpec
from model.decoding.grammar.source import MAX_SOURCE_BYTES
from server.api.auth import Caller
from server.api.schemas.generation import SamplingRequest
from server.api.schemas.structure import JsonSchemaFormat, StructuredOutputs, TextFormat
from server.api.service import Service
from server.api.texts import LONG
from server.errors import InvalidRequest, Overloaded

GUIDED = "guided_"
STRUCTURES = (
    "structured_outputs",
    *(f"{GUIDED}{kind}" for kind in ("json", "regex", "grammar", "choice")),
)
"""Structure parameters other than OpenAI's."""


async def read_grammar(service: Service, caller: Caller, body: SamplingRequest) -> Grammar | None:
    """The compiled grammar for the text, if it is constrained; compiles off the event loop.

    A rejected new source is charged as a request, and so is every whole second of compilation.
    Raises InvalidRequest for a source that is invalid or too slow, Overloaded if too many others
    are being compiled, and RateLimited.
    """
    if body.requested_format is None and all(getattr(body, name) is None for name in STRUCTURES):
        return None
    asked = await service.texts.run(LONG, _bounded_spec, body)
    if asked is None:
        return None
    spec, param = asked
    timeout_s, owner = service.settings.grammar_timeout_s, caller.owner
    if not service.grammars.is_known(spec):
        await service.limiter.check(caller, 0)
    num_refused = 0
    try:
        return await service.grammars.compile_within(spec, timeout_s, owner)
    except GrammarError as error:
        num_refused = 1
        raise InvalidRequest(str(error), param, "invalid_grammar") from error
    except GrammarBusyError as error:
        raise Overloaded(str(error), "grammar_queue_full") from error
    finally:
        cost = num_refused + service.grammars.pop_seconds(owner)
        await service.limiter.record(caller, "requests", cost)


def _bounded_spec(body: SamplingRequest) -> tuple[GrammarSpec, str] | None:
    """`_requested_spec`, within the size limit. Raises InvalidRequest."""
    asked = _requested_spec(body)
    if asked is not None:
        spec, param = asked
        try:
            spec.check_size()
        except GrammarError as error:
            raise InvalidRequest(str(error), param, "invalid_grammar") from error
    return asked


def _requested_spec(body: SamplingRequest) -> tuple[GrammarSpec, str] | None:
    """The grammar's source and its parameter. Raises InvalidRequest."""
    given = [body.format_name] if not isinstance(body.requested_format, TextFormat | None) else []
    given += [name for name in STRUCTURES if getattr(body, name) is not None]
    if len(given) > 1:
        raise InvalidRequest(f"give either {given[0]} or {given[1]}", given[1])
    match given:
        case []:
            return None
        case ["structured_outputs"]:
            return _of_outputs(body.structured_outputs or StructuredOutputs())
        case [name] if name.startswith(GUIDED):
            outputs = StructuredOutputs(**{name.removeprefix(GUIDED): getattr(body, name)})
            return _of_outputs(outputs)[0], name
    return _of_format(body.requested_format), body.format_name


def _of_format(given: object) -> GrammarSpec:
    if isinstance(given, JsonSchemaFormat) and given.json_schema.schema_ is not None:
        return GrammarSpec("json_schema", _source(given.json_schema.schema_))
    return GrammarSpec("json_object")


def _source(schema: object) -> str:
    """Serialize a schema in parts, between which other threads can have the GIL.

    Stops once the size limit is exceeded.
    """
    parts, size = list[str](), 0
    for part in json.JSONEncoder().iterencode(schema):
        parts.append(part)
        size += len(part)
        if size > MAX_SOURCE_BYTES:
            break
    return "".join(parts)


def _of_outputs(given: StructuredOutputs) -> tuple[GrammarSpec, str]:
    """Exactly one field is set."""
    name = "structured_outputs"
    if given.json_ is not None:
        source = given.json_ if isinstance(given.json_, str) else _source(given.json_)
        return GrammarSpec("json_schema", source), f"{name}.json"
    if given.regex is not None:
        return GrammarSpec("regex", given.regex), f"{name}.regex"
    if given.grammar is not None:
        return GrammarSpec("grammar", given.grammar), f"{name}.grammar"
    if given.choice is not None:
        return GrammarSpec("choice", tuple(given.choice)), f"{name}.choice"
    return GrammarSpec("json_object"), f"{name}.json_object"
