"""What all measurements share: settings, interleaved timing and ratios with their uncertainty.

Needs torch and numpy only: `moepeft_inside.py` uses it in an environment without moelora.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_CALLS_ON_CUDA = 10  # one call takes less than launching it does
_RESAMPLES = 400

_FEWEST, _FEWEST_QUICK, _MOST = 5, 2, 100  # rounds
_SECONDS, _SECONDS_QUICK = 45.0, 6.0  # for the candidates of one comparison


@dataclass(frozen=True)
class Settings:
    """What every measurement is run with.

    Attributes:
        threads: of torch, on the CPU.
        device: "cpu" or "cuda".
        dtype: of activations and the frozen base; trained tensors stay fp32, as in mixed precision.
        quick: fewer sizes and rounds.
        rounds: how many to run; by default as many as fit in a fixed time.
        say: told what is going on.
    """

    threads: int = 2
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    quick: bool = False
    rounds: int | None = None
    say: Callable[[str], None] = lambda text: None

    def more(self, rounds: int, seconds: float) -> bool:
        """Whether to go on after so many rounds and seconds."""
        if self.rounds is not None:
            return rounds < self.rounds
        fewest, budget = (_FEWEST_QUICK, _SECONDS_QUICK) if self.quick else (_FEWEST, _SECONDS)
        return rounds < fewest or (rounds < _MOST and seconds < budget)

    def autocast(self) -> AbstractContextManager[Any]:
        """What a training step runs in."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device, self.dtype)


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians, or a median; and the middle 90 % of what resampled rounds give for it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """One row of the table.

    Attributes:
        what: what was done.
        ours: our figure, with its unit.
        against: what ours is compared with.
        theirs: the other's figure.
        ratio: the figure that the target is about; `unit` says of what kind.
        at_most: the target, if it is an upper bound.
        at_least: the target, if it is a lower bound.
        unit: "x" for a ratio, "s" for seconds.
    """

    what: str
    ours: str
    against: str
    theirs: str
    ratio: Ratio
    at_most: float | None = None
    at_least: float | None = None
    unit: str = "x"

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.at_most is not None:
            return self.ratio.value <= self.at_most
        if self.at_least is not None:
            return self.ratio.value >= self.at_least
        return None


@dataclass
class Result:
    """What one measurement found.

    Attributes:
        comparisons: rows of the table.
        medians: every median by name; seconds where the name has no unit.
        rounds: how many rounds each group of medians is over.
        left_out: what was not measured, and why.
    """

    comparisons: list[Comparison] = field(default_factory=list)
    medians: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, group: str, times: Times) -> None:
        """Take over the medians of a group."""
        self.medians |= {f"{group}: {name}": times.median(name) for name in times.seconds}
        self.rounds[group] = times.rounds

    def as_json(self) -> dict[str, Any]:
        """Plain values, with `met` spelled out."""
        values = asdict(self)
        for comparison, row in zip(self.comparisons, values["comparisons"], strict=True):
            row["met"] = comparison.met
        return values


class Times:
    """Seconds by candidate and round; not a number where a candidate sat a round out."""

    def __init__(self, seconds: Mapping[str, Iterable[float]]) -> None:
        self.seconds = {name: np.array(list(values)) for name, values in seconds.items()}
        self.rounds = len(next(iter(self.seconds.values())))

    def median(self, name: str, minus: str | None = None) -> float:
        """Median seconds, of what remains after taking `minus` off in each round where given."""
        return float(np.median(self._of(name, minus)))

    def ratio(self, name: str, other: str, minus: str | None = None) -> Ratio:
        """Median of `name` over that of `other`. Rounds that both ran in are resampled together."""
        above, below = self._of(name, minus), self._of(other, minus)
        for_above, for_below = _draws(len(above), 0), _draws(len(below), len(below) != len(above))
        resampled = np.median(above[for_above], 1) / np.median(below[for_below], 1)
        return _ratio(np.median(above) / np.median(below), resampled)

    def value(self, name: str) -> Ratio:
        """Median seconds as a figure of its own."""
        values = self._of(name, None)
        return _ratio(np.median(values), np.median(values[_draws(len(values), 0)], 1))

    def compare(
        self,
        what: str,
        ours: str,
        other: str,
        minus: str | None = None,
        *,
        theirs_over_ours: bool = False,
        **target: float,
    ) -> Comparison:
        """A row on two candidates: ours over the other, or the other over ours.

        Args:
            what: what was done.
            ours: a candidate.
            other: another one.
            minus: a candidate whose time is taken off both.
            theirs_over_ours: how many times faster ours is.
            **target: `at_most` or `at_least`.
        """
        pair = (other, ours) if theirs_over_ours else (ours, other)
        figures = (milliseconds(self.median(name, minus)) for name in (ours, other))
        return Comparison(
            what, next(figures), other, next(figures), self.ratio(*pair, minus), **target
        )

    def _of(self, name: str, minus: str | None) -> np.ndarray[Any, Any]:
        """Of the rounds that the candidate took part in."""
        values = self.seconds[name]
        values = values if minus is None else values - self.seconds[minus]
        return values[~np.isnan(values)]


def _draws(count: int, seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(count, size=(_RESAMPLES, count))


def _ratio(value: Any, resampled: np.ndarray[Any, Any]) -> Ratio:
    low, high = np.quantile(resampled, (0.05, 0.95))
    return Ratio(float(value), float(low), float(high))


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    settings: Settings,
    *,
    seldom: Iterable[str] = (),
    warm_up: int = 2,
    label: str = "",
) -> Times:
    """Time candidates side by side: one call each in every round, in an order drawn anew.

    What disturbs the machine for a while disturbs all alike, and none always follows the same
    other one.

    Args:
        candidates: what to call.
        settings: where they run.
        seldom: slow candidates, which take part in every fifth round only.
        warm_up: rounds before those that count, for caches and the allocator.
        label: what is going on, for the progress line.
    """
    torch.set_num_threads(settings.threads)
    seldom = set(seldom)
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()  # a collection would hit whoever runs at the time
    try:
        start = time.perf_counter()
        turn = -warm_up
        while turn < 0 or settings.more(turn, time.perf_counter() - start):
            settings.say(f"{label}, round {max(turn, 0) + 1}")
            drawn = [
                name for name in candidates if name not in seldom or turn == -1 or turn % 5 == 0
            ]
            order.shuffle(drawn)
            for name in drawn:
                taken = clock(candidates[name], settings.device)
                if turn >= 0:
                    seconds[name].append(taken)
            if turn >= 0:
                for name in candidates.keys() - set(drawn):
                    seconds[name].append(float("nan"))
            turn += 1
    finally:
        if collecting:
            gc.enable()
    return Times(seconds)


def clock(call: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(_CALLS_ON_CUDA):
        call()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / _CALLS_ON_CUDA


def milliseconds(seconds: float) -> str:
    """Seconds as people read them."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def parser(doc: str) -> argparse.ArgumentParser:
    """The options that every measurement has."""
    made = argparse.ArgumentParser(description=doc.partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    made.add_argument("--rounds", type=int, help="how many; by default a fixed time")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    made.add_argument("--dtype", default="float32", choices=tuple(DTYPES))
    made.add_argument("--json", help="file to write")
    made.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    return made


def settings_of(options: argparse.Namespace) -> Settings:
    """Settings from parsed options."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("No CUDA device is there; leave --device out.")
    return Settings(
        options.threads, options.device, DTYPES[options.dtype], options.quick, options.rounds
    )
