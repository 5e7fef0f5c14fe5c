"""Turns outside of a request."""

from collections.abc import Iterator

import pytest

from server.api.held import HOLD, HeldBytes, Hold
from tests.server.api.generation.services import CALLER


@pytest.fixture(autouse=True)
def hold() -> Iterator[None]:
    """What the authentication middleware sets for each request."""
    token = HOLD.set(Hold(HeldBytes(1 << 20), CALLER.owner))
    yield
    HOLD.reset(token)
