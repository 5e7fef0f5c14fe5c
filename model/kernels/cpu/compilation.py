"""Detects when Numba compiles, and for which processor."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from numba.core import event, registry

VECTORS = {"+avx512f": "AVX-512", "+avx2": "AVX2", "+neon": "NEON"}
"""By LLVM feature name, widest first."""


def target() -> str:
    """Architecture and vector instructions of compiled code, for messages."""
    architecture, features = _target()
    vectors = [name for feature, name in VECTORS.items() if feature in features]
    return " with ".join([architecture, *vectors[:1]])


def can_fuse() -> bool:
    """Whether the processor has fused multiply-adds.

    Without them, each one in a product would be a call to the C library.
    """
    architecture, features = _target()
    return architecture != "x86_64" or "+fma" in features


def features() -> list[str]:
    """LLVM features available to compiled code: `+avx2`, `-avx512f`."""
    return _target()[1]


def _target() -> tuple[str, list[str]]:
    triple, _, features = registry.cpu_target.target_context.codegen().magic_tuple()
    return triple.split("-")[0], features.split(",")


@contextmanager
def watch(begun: Callable[[], None], ended: Callable[[float], None]) -> Iterator[None]:
    """Call `begun` when the first function is compiled, and `ended` with the total seconds.

    Neither is called if all machine code is cached.
    """
    listener = _FirstCompilation(begun)
    # A dispatcher's event excludes code generation; the lock is held throughout.
    with (
        event.install_listener("numba:compile", listener),
        event.install_listener("numba:compiler_lock", event.TimingListener()) as timer,
    ):
        yield
    if listener.happened:
        ended(timer.duration)


class _FirstCompilation(event.Listener):  # type: ignore[misc]  # Numba has no types
    def __init__(self, begun: Callable[[], None]) -> None:
        self._begun = begun
        self.happened = False

    def on_start(self, event: object) -> None:
        del event
        if not self.happened:
            self.happened = True
            self._begun()

    def on_end(self, event: object) -> None: ...
