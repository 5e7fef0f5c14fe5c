"""Names in a request that nobody knows: refused, or ignored where the operator says so."""

import logging
from contextvars import ContextVar
from typing import Literal

MOST_NAMED = 1000
LONGEST_NAME = 80
log = logging.getLogger(__name__)


class UnknownParameters:
    """What a server does with them. One that is ignored is logged once."""

    def __init__(self, policy: Literal["refuse", "ignore"] = "refuse") -> None:
        self._ignores = policy == "ignore"
        self._named = set[str]()

    def ignores(self, name: str) -> bool:
        """Whether a parameter of this name is to be dropped."""
        if not self._ignores:
            return False
        shown = name[:LONGEST_NAME]
        if shown not in self._named and len(self._named) < MOST_NAMED:
            self._named.add(shown)
            log.warning("unknown parameter %r is ignored", shown)
        return True


POLICY: ContextVar[UnknownParameters] = ContextVar("POLICY", default=UnknownParameters())  # noqa: B039
"""Of the server that reads the request: models are validated without a context of their own."""
