"""The update of sums by several tokens, against its definition."""

import numpy as np
import pytest

sums = pytest.importorskip("model.kernels.cpu.sums")


@pytest.mark.parametrize(("d_key", "d_val"), [(8, 32), (5, 19), (3, 2)])
def test_tokens_are_added_in_order_whatever_the_division(d_key: int, d_val: int) -> None:
    random = np.random.default_rng(0)
    tokens = 11
    keys = random.random((3, tokens, d_key), np.float32)
    vals = random.random((3, tokens, d_val), np.float32)
    higher = random.random(tokens) < 0.4
    exact, read = np.zeros((d_key, d_val)), []
    for t in range(tokens):
        if higher[t]:
            exact *= np.outer(keys[sums.KEPT, t], vals[sums.KEPT, t])
        exact += np.outer(keys[sums.ADDED, t].astype(float), vals[sums.ADDED, t])
        read.append(keys[sums.READ, t] @ exact)

    def added(parts: list[int]) -> tuple[bytes, bytes, bytes]:
        s, low = np.zeros((d_key, d_val), np.float32), np.zeros((d_key, d_val), np.int8)
        found, first = [], 0
        for count in parts:
            part = slice(first, first + count)
            own = vals[:, part].copy()
            sums.update(count, s, low, keys[:, part].copy(), own, higher[part].copy())
            found.append(own[sums.READ])
            first += count
        np.testing.assert_allclose(s, exact, rtol=2e-7)
        np.testing.assert_allclose(np.concatenate(found), read, rtol=2e-6)
        return s.tobytes(), low.tobytes(), np.concatenate(found).tobytes()

    assert added([tokens]) == added([1] * tokens) == added([3, 8])
