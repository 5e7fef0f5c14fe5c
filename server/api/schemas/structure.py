"""Models of structured output."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, JsonValue, Tag, model_validator
from pydantic_core import PydanticCustomError

from server.api.schemas.base import AS_JSON, RequestModel, Text

JsonSchema = dict[str, Any] | bool
GrammarText = Annotated[Text, Field(min_length=1)]
Choices = Annotated[list[Text], Field(min_length=1, fail_fast=True)]
PERSON: JsonSchema = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
    "additionalProperties": False,
}
"""The example."""


class NamedSchema(RequestModel):
    """A JSON schema with a name."""

    name: Annotated[Text, Field(min_length=1, max_length=64)] = Field(examples=["person"])
    """No effect on the text."""

    description: Text | None = Field(None, examples=["Somebody."])
    """No effect on the text."""

    schema_: Annotated[JsonSchema | None, Field(alias="schema"), AS_JSON] = Field(
        None, examples=[PERSON]
    )
    """The JSON schema; default: any JSON object. Unenforceable schemas are rejected."""

    strict: bool | None = None
    """No effect: schemas are always enforced."""


class TextFormat(RequestModel):
    """Unconstrained text."""

    type: Literal["text"]
    """No constraint."""


class JsonObjectFormat(RequestModel):
    """Any JSON object."""

    type: Literal["json_object"]
    """Any JSON object."""


class JsonSchemaFormat(RequestModel):
    """JSON described by a schema."""

    type: Literal["json_schema"]
    """JSON described by a schema."""

    json_schema: NamedSchema
    """The schema."""


def _kind_of_format(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"({kind})" if kind in ("text", "json_object", "json_schema") else None


FORMAT = Discriminator(
    _kind_of_format,
    custom_error_type="format",
    custom_error_message="The type must be text, json_object or json_schema",
)
ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("(text)")]
    | Annotated[JsonObjectFormat, Tag("(json_object)")]
    | Annotated[JsonSchemaFormat, Tag("(json_schema)")],
    FORMAT,
]


_NOT_NULL: JsonValue = {"not": {"type": "null"}}
_GIVEN: dict[str, JsonValue] = {
    **dict.fromkeys(("json", "regex", "grammar", "choice"), _NOT_NULL),
    "json_object": {"const": True},
}
"""Schema of each field when given, for the documentation."""


class StructuredOutputs(RequestModel):
    """A constraint on the text: exactly one of these fields."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": [name], "properties": {name: given}} for name, given in _GIVEN.items()
            ],
            "examples": [{"choice": ["yes", "no"]}],
        }
    )

    json_: Annotated[JsonSchema | Text | None, Field(alias="json"), AS_JSON] = Field(
        None, examples=[PERSON]
    )
    """A JSON schema, or its text."""

    json_object: bool | None = None
    """Any JSON object."""

    regex: GrammarText | None = Field(None, examples=["[0-9]{4}"])
    """A regular expression that must match the whole text, in the syntax of Rust's regex crate."""

    grammar: GrammarText | None = Field(None, examples=['root ::= "yes" | "no"'])
    """A context-free grammar: llguidance's Lark if it has a rule `start`, else llama.cpp's GBNF."""

    choice: Choices | None = Field(None, examples=[["yes", "no"]])
    """One of these strings."""

    @model_validator(mode="after")
    def _is_one(self) -> "StructuredOutputs":
        given = [self.json_, self.json_object or None, self.regex, self.grammar, self.choice]
        if sum(value is not None for value in given) != 1:
            raise PydanticCustomError(
                "structure", "Give one of json, json_object, regex, grammar and choice"
            )
        return self
