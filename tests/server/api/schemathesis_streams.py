"""The checks on requests that all stream, which random generation produces too rarely."""

from typing import Any

import schemathesis
from schemathesis import Case, HookContext

import tests.server.api.schemathesis_checks  # noqa: F401 (which registers the checks)


@schemathesis.hook
def before_call(context: HookContext, case: Case[Any], kwargs: dict[str, Any]) -> None:
    del context, kwargs
    if isinstance(case.body, dict):
        case.body["stream"] = True
