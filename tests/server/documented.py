"""Documented statuses of a server's calls."""

import re
from typing import Any

import httpx

EVERYWHERE = {413, 421, 431}
"""Statuses that any call may return, as documented for all calls together."""


class Documented:
    """The statuses of each call."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._statuses = {
            method.upper(): [
                (self._pattern(path), {int(status) for status in methods[method]["responses"]})
                for path, methods in document["paths"].items()
                if method in methods
            ]
            for method in ("get", "post", "delete")
        }

    def check(self, response: httpx.Response) -> None:
        """Raises AssertionError for a status that is not documented."""
        request = response.request
        for pattern, statuses in self._statuses.get(request.method, []):
            if pattern.fullmatch(request.url.path):
                seen = f"{request.method} {request.url.path}: {response.status_code}"
                assert response.status_code in statuses | EVERYWHERE, seen
                return

    def _pattern(self, path: str) -> re.Pattern[str]:
        return re.compile(re.sub(r"\{\w+\}", "[^/]+", path))
