"""Unknown request parameters: rejected, or ignored if the operator says so."""

import logging
from contextvars import ContextVar
from typing import Literal

MAX_LOGGED_NAMES = 1000
LONGEST_NAME = 80
log = logging.getLogger(__name__)


class UnknownParameters:
    """A server's policy for unknown parameters. Ignored names are logged once."""

    def __init__(self, policy: Literal["refuse", "ignore"] = "refuse") -> None:
        self._ignores = policy == "ignore"
        self._named = set[str]()

    def ignores(self, name: str) -> bool:
        """Whether to drop a parameter with this name."""
        if not self._ignores:
            return False
        shown = name[:LONGEST_NAME]
        if shown not in self._named and len(self._named) < MAX_LOGGED_NAMES:
            self._named.add(shown)
            log.warning("unknown parameter %r is ignored", shown)
        return True


POLICY: ContextVar[UnknownParameters] = ContextVar("POLICY", default=UnknownParameters())  # noqa: B039
"""The policy of the current request's server; models are validated without other context."""
