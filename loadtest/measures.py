"""Statistics of samples: percentiles, goodput under objectives, and intervals."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loadtest.client import Sample

PERCENTILES = (50, 90, 95, 99)
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
OBJECTIVES = ("ttft", "itl", "tpot", "e2e")
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Objective:
    """Maximum seconds of one kind that a request may need.

    For `itl` it applies to the 95th percentile of a request's gaps between events; the others are
    one number.
    """

    kind: str
    most_s: float

    @classmethod
    def parse(cls, text: str) -> "Objective":
        """Parses `ttft=500ms` or `itl<=0.1s`. Raises ValueError with the reason."""
        match = re.fullmatch(r"(\w+)\s*<?=\s*([\d.]+)\s*(us|ms|s)", text.strip())
        if match is None or match[1] not in OBJECTIVES or match[2].count(".") > 1:
            kinds = ", ".join(OBJECTIVES)
            raise ValueError(f"{text!r} is not an objective like ttft=500ms; kinds: {kinds}")
        return cls(match[1], float(match[2]) * UNITS[match[3]])

    def is_met(self, sample: Sample) -> bool:
        """Whether a request meets it; also true with too few tokens to have such a time."""
        match self.kind:
            case "itl":
                found = float(np.percentile(sample.gaps, 95)) if sample.gaps else None
            case kind:
                found = getattr(sample, kind)
        return sample.error is None and (found is None or found <= self.most_s)

    def __str__(self) -> str:
        return f"{self.kind} <= {1e3 * self.most_s:g} ms"


@dataclass(frozen=True)
class Summary:
    """Summary of a run. Times are in seconds, over complete answers."""

    requests: int
    seconds: float
    """From the first scheduled send to the last end."""

    percentiles: dict[str, dict[str, float]]
    """By kind (ttft, itl, tpot, e2e), then `p50` and so on, and `mean`."""

    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens: int
    output_tokens: int
    resumed: int
    """Requests that resumed a session."""

    objectives: list[str]
    good: int
    """Requests that met all objectives."""

    attainment: float
    """Their share."""

    goodput_per_s: float
    errors: dict[str, int]
    """By kind."""

    late_p99_s: float
    """Delay of the load generator, from the scheduled to the actual send. If large, it was the
    bottleneck."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def is_good(sample: Sample, objectives: Sequence[Objective]) -> bool:
    """Whether it is complete and meets all objectives."""
    return sample.error is None and all(each.is_met(sample) for each in objectives)


def summarise(samples: Sequence[Sample], objectives: Sequence[Objective]) -> Summary:
    """Raises ValueError if there are none."""
    if not samples:
        raise ValueError("no samples to summarise")
    whole = [sample for sample in samples if sample.error is None]
    times = {
        "ttft": [sample.ttft for sample in whole if sample.ttft is not None],
        "itl": [gap for sample in whole for gap in sample.gaps],
        "tpot": [sample.tpot for sample in whole if sample.tpot is not None],
        "e2e": [sample.e2e for sample in whole],
    }
    seconds = max(s.ended for s in samples) - min(s.intended for s in samples)
    good = sum(is_good(sample, objectives) for sample in samples)
    tokens = sum(sample.output_tokens for sample in whole)
    return Summary(
        requests=len(samples),
        seconds=seconds,
        percentiles={kind: spread(values) for kind, values in times.items() if values},
        requests_per_s=len(whole) / seconds,
        output_tokens_per_s=tokens / seconds,
        prompt_tokens=sum(sample.prompt_tokens for sample in whole),
        output_tokens=tokens,
        resumed=sum(sample.is_resumed for sample in samples),
        objectives=[str(objective) for objective in objectives],
        good=good,
        attainment=good / len(samples),
        goodput_per_s=good / seconds,
        errors=dict(Counter(sample.error for sample in samples if sample.error is not None)),
        late_p99_s=float(np.percentile([s.sent - s.intended for s in samples], 99)),
    )


def spread(values: Sequence[float]) -> dict[str, float]:
    """Percentiles and mean."""
    found = np.percentile(values, PERCENTILES)
    named = {f"p{p}": float(v) for p, v in zip(PERCENTILES, found, strict=True)}
    return named | {"mean": float(np.mean(values))}


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def student_t(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's distribution, by its density."""
    x = np.linspace(0, 200, 400_001)
    density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    area = np.cumsum(density)
    tail = 1.0 if freedom == 1 else 0.0  # of the density beyond the grid, x ** -2 for one degree
    area /= area[-1] + tail * density[-1] * x[-1] / (x[1] - x[0])
    return float(np.interp(CONFIDENCE, area, x))


def geometric_mean(ratios: ArrayLike) -> Interval:
    """Geometric mean of at least two ratios, one per round."""
    logs: NDArray[np.float64] = np.log(np.asarray(ratios, np.float64))
    count = len(logs)
    if count < 2:
        raise ValueError("an interval needs at least two rounds")
    mean, half = float(logs.mean()), student_t(count - 1) * float(logs.std(ddof=1)) / count**0.5
    return Interval(*(float(np.exp(each)) for each in (mean, mean - half, mean + half)))


def slope(at: ArrayLike, values: ArrayLike, blocks: int = 12) -> Interval:
    """Growth of values with `at`, from a line through the means of equal blocks.

    Neighbouring samples of a process are correlated; the means of long blocks are nearly
    independent. At least `blocks` samples and 3 blocks.
    """
    x, y = np.asarray(at, np.float64), np.asarray(values, np.float64)
    if len(x) < blocks or blocks < 3:
        raise ValueError(f"a slope needs at least {max(blocks, 3)} samples, not {len(x)}")
    parts = np.array_split(np.arange(len(x)), blocks)
    x, y = (np.array([each[part].mean() for part in parts]) for each in (x, y))
    away = x - x.mean()
    value = float(away @ y / (away @ away))
    left = y - y.mean() - value * away
    error = float(np.sqrt(left @ left / (blocks - 2) / (away @ away)))
    half = student_t(blocks - 2) * error
    return Interval(value, value - half, value + half)
