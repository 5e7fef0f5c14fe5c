"""Building blocks of request models."""

import math
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    Tag,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError
from pydantic_core.core_schema import no_info_plain_validator_function

from server.api.schemas.unknown import POLICY

VALIDATION_BATCH = 65_536
"""List items validated at a time."""


def _kind_of_prompt(value: Any) -> str:
    """Choose the form of a prompt by its first element, so that only that form is validated."""
    if not isinstance(value, list):
        return "(text)"
    first = value[0] if value else 0
    if isinstance(first, list):
        return "(token_lists)"
    return "(tokens)" if isinstance(first, int | float) else "(texts)"


def _validate_integers(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Accept 1.0 as an integer, as JSON and its schemas do.

    A long list is validated in parts, between which other threads can have the GIL.
    """
    if isinstance(value, list) and len(value) > VALIDATION_BATCH:
        checked = []
        for start in range(0, len(value), VALIDATION_BATCH):
            try:
                checked += _validate_integers(value[start : start + VALIDATION_BATCH], validate)
            except ValidationError as error:
                raise _further_on(error, start) from None
        return checked
    try:
        return validate(value)
    except ValidationError:
        whole = _whole(value)
        if whole == value and whole is not value:
            return validate(whole)
        raise


def _further_on(error: ValidationError, start: int) -> ValidationError:
    """Shift the location of a part's first error to the whole list."""
    first = error.errors(include_url=False)[0]
    match first["loc"]:
        case (int(index), *inner):
            place: tuple[int | str, ...] = (start + index, *inner)
        case place:
            pass
    details = InitErrorDetails(
        type=first["type"], loc=place, input=first["input"], ctx=first.get("ctx", {})
    )
    return ValidationError.from_exception_data(error.title, [details])


def _whole(value: Any) -> Any:
    """Convert integral floats to integers."""
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_unicode(text: str) -> str:
    """Reject unpaired surrogates, which JSON can spell but no encoding can represent."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _unpaired() from None
    return text


def _unpaired() -> PydanticCustomError:
    return PydanticCustomError("text", "Text must not contain an unpaired surrogate")


def _check_json(value: Any) -> Any:
    """Check arbitrary JSON: Unicode, finite, and not too deep to be serialized."""
    level = [value]
    for _ in range(MAX_DEPTH):
        if not level:
            return value
        level = [inner for outer in level for inner in _parts(outer)]
    raise PydanticCustomError("depth", "JSON must not be nested deeper than {n}", {"n": MAX_DEPTH})


def _parts(value: Any) -> Iterable[Any]:
    match value:
        case str():
            _check_unicode(value)
        case float() if not math.isfinite(value):
            raise PydanticCustomError("finite_number", "Numbers must be finite")
        case dict():
            return (*value, *value.values())
        case list():
            return value
    return ()


class Unsupported:
    """Annotates an OpenAI parameter that this server does not support.

    null and the `harmless` values are accepted; all others are rejected by name.
    """

    def __init__(self, why: str, *harmless: Any) -> None:
        self._why = why
        self._harmless = (None, *harmless)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        del source, handler
        return no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        del schema, handler
        return {"enum": list(self._harmless), "description": f"Not supported: {self._why}."}

    def _check(self, value: Any) -> None:
        if not any(type(value) is type(v) and value == v for v in self._harmless):
            raise PydanticCustomError("unsupported", "{why}", {"why": self._why})


MAX_DEPTH = 128
"""Maximum nesting of arbitrary JSON. The serializer stops at about 255."""

AS_JSON = AfterValidator(_check_json)
"""Annotates arbitrary JSON."""


class Ignored:
    """Annotates a parameter that is accepted and ignored."""

    def __init__(self, why: str, example: Any) -> None:
        self._why = why
        self._example = example

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        del source, handler
        return no_info_plain_validator_function(lambda _: None)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        del schema, handler
        return {
            "description": f"{self._why}; ignored.",
            "examples": [self._example],
        }


Text = Annotated[str, AfterValidator(_check_unicode)]
WHOLE = WrapValidator(_validate_integers)
"""Annotates integers and lists of them."""

EXAMPLE_SESSION = "sess_h4kJ0cX2mVq9Zt7RbWnYs1LdPfGaEuQo"
EXAMPLE_STREAM = "chatcmpl-4f0c1b7e9d2a46538c71e0f4a9b3d652"
EXAMPLE_RESPONSE = "resp_Qm3xT8vLc0ZrJ5wKpBn2YdHsFgAeUi7o"
EXAMPLE_MESSAGE = "msg_7d1f0a52c8e94b63a1f2d3c4b5a69788"

LARGEST = 2**53
"""Largest integer that every JSON reader can represent."""

TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=LARGEST)]], Field(fail_fast=True), WHOLE]
Prompt = Annotated[
    Annotated[Text, Tag("(text)")]
    | Annotated[list[Text], Field(min_length=1, fail_fast=True), Tag("(texts)")]
    | Annotated[TokenIds, Tag("(tokens)")]
    | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True), Tag("(token_lists)")],
    Discriminator(_kind_of_prompt),
]
StopString = Annotated[Text, Field(min_length=1, max_length=1024)]
StopStrings = Annotated[
    Annotated[StopString, Tag("(text)")]
    | Annotated[list[StopString], Field(fail_fast=True), Tag("(texts)")],
    Discriminator(lambda value: "(texts)" if isinstance(value, list) else "(text)"),
]
UnixSecond = Annotated[int, Field(examples=[1_767_225_600])]
UnixTime = Annotated[float, Field(examples=[1_767_225_600.5])]
ResponseTokenIds = Annotated[list[int], Field(examples=[[7, 205, 2]])]


class ResponseModel(BaseModel):
    """Base class of response models."""

    model_config = ConfigDict(use_attribute_docstrings=True, cache_strings="keys")


class RequestModel(BaseModel):
    """Base class of request models: strict types and names; null means the default, even for
    unknown names."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_unknown(cls, value: Any) -> Any:
        """Drop unknown names that are null or ignored by policy."""
        if not isinstance(value, dict):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = value.keys() - known
        if not unknown:
            return value
        policy = POLICY.get()
        dropped = {name for name in unknown if value[name] is None or policy.ignores(name)}
        return {name: part for name, part in value.items() if name not in dropped}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        schema = handler(core_schema)
        handler.resolve_ref_schema(schema)["additionalProperties"] = {"type": "null"}
        return schema
