"""The shape of every error."""

from pydantic import Field

from server.api.schemas.base import AnswerModel


class ErrorDetail(AnswerModel):
    """What is wrong."""

    message: str = Field(examples=["temperature: Input should be less than or equal to 10, not 11"])
    """For people: what is wrong, and what would be right."""

    type: str = Field(examples=["invalid_request_error"])
    """The family of errors that it belongs to."""

    param: str | None = Field(examples=["temperature"])
    """The parameter that is wrong, as a path such as `stop[1]`; null if it is not one of them."""

    code: str = Field(examples=["invalid_value"])
    """For programs: which error it is."""


class ErrorResponse(AnswerModel):
    """The shape of every error."""

    error: ErrorDetail
    """The error."""
