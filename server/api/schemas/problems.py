"""Response body of every error."""

from pydantic import Field

from server.api.schemas.base import ResponseModel


class ErrorDetail(ResponseModel):
    """Details of an error."""

    message: str = Field(examples=["temperature: Input should be less than or equal to 10, not 11"])
    """Human-readable description."""

    type: str = Field(examples=["invalid_request_error"])
    """The type of error."""

    param: str | None = Field(examples=["temperature"])
    """Path of the invalid parameter, such as `stop[1]`; null if none is."""

    code: str = Field(examples=["invalid_value"])
    """Machine-readable code."""


class ErrorResponse(ResponseModel):
    """Response body of every error."""

    error: ErrorDetail
    """The error."""
