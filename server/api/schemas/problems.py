"""The shape of every error."""

from server.api.schemas.base import AnswerModel


class ErrorDetail(AnswerModel):
    """What is wrong."""

    message: str
    """For people: what is wrong, and what would be right."""

    type: str
    """The family of errors that it belongs to."""

    param: str | None
    """The parameter that is wrong, as a path such as `stop[1]`; null if it is not one of them."""

    code: str
    """For programs: which error it is."""


class ErrorResponse(AnswerModel):
    """The shape of every error."""

    error: ErrorDetail
    """The error."""
