"""What requests of all kinds are made of."""

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
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_plain_validator_function

from server.api.schemas.unknown import POLICY


def _kind_of_prompt(value: Any) -> str:
    """Which form of a prompt the first element shows, so that only that form is checked."""
    if not isinstance(value, list):
        return "(text)"
    first = value[0] if value else 0
    if isinstance(first, list):
        return "(token_lists)"
    return "(tokens)" if isinstance(first, int | float) else "(texts)"


def _take_whole(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """For JSON, and so for its schemas, 1.0 is an integer."""
    try:
        return validate(value)
    except ValidationError:
        whole = _whole(value)
        if whole == value and whole is not value:
            return validate(whole)
        raise


def _whole(value: Any) -> Any:
    """The value with integers where it has floats that are whole."""
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_unicode(text: str) -> str:
    """JSON can spell half of a surrogate pair, which no encoding of text has a place for."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise PydanticCustomError("text", "Text must not contain an unpaired surrogate")
    return text


class Refused:
    """Annotates a parameter of OpenAI's that this server cannot honour.

    null and the `harmless` values ask for nothing and are taken; all others are refused by name.
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


class Neutral:
    """Annotates a parameter that changes nothing here, whatever its value, which is not kept."""

    def __init__(self, why: str, example: Any) -> None:
        self._why = why
        self._example = example

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        del source, handler
        return no_info_plain_validator_function(lambda _: None)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        del schema, handler
        return {
            "description": f"{self._why}; it changes nothing.",
            "examples": [self._example],
        }


Text = Annotated[str, AfterValidator(_check_unicode)]
WHOLE = WrapValidator(_take_whole)
"""Annotates integers and lists of them."""

EXAMPLE_SESSION = "sess_h4kJ0cX2mVq9Zt7RbWnYs1LdPfGaEuQo"
EXAMPLE_STREAM = "chatcmpl-4f0c1b7e9d2a46538c71e0f4a9b3d652"
EXAMPLE_RESPONSE = "resp_Qm3xT8vLc0ZrJ5wKpBn2YdHsFgAeUi7o"
EXAMPLE_MESSAGE = "msg_7d1f0a52c8e94b63a1f2d3c4b5a69788"

LARGEST = 2**53
"""Beyond it not every program that reads JSON has integers."""

TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=LARGEST)]], Field(fail_fast=True), WHOLE]
Prompt = Annotated[
    Annotated[Text, Tag("(text)")]
    | Annotated[list[Text], Field(min_length=1, fail_fast=True), Tag("(texts)")]
    | Annotated[TokenIds, Tag("(tokens)")]
    | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True), Tag("(token_lists)")],
    Discriminator(_kind_of_prompt),
]
StopString = Annotated[Text, Field(min_length=1, max_length=1024)]
Stop = Annotated[
    Annotated[StopString, Tag("(text)")]
    | Annotated[list[StopString], Field(fail_fast=True), Tag("(texts)")],
    Discriminator(lambda value: "(texts)" if isinstance(value, list) else "(text)"),
]
UnixSecond = Annotated[int, Field(examples=[1_767_225_600])]
UnixTime = Annotated[float, Field(examples=[1_767_225_600.5])]
AnswerTokenIds = Annotated[list[int], Field(examples=[[7, 205, 2]])]


class AnswerModel(BaseModel):
    """What a client reads."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class RequestModel(BaseModel):
    """Strict about types and names; an explicit null means the default, also in unknown names."""

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
        """Without the unknown names that ask for nothing, or that the server ignores."""
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
