"""Sum up and compare recipes that were each trained with several seeds."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moelora_eval_tasks.metrics import Array
from moelora_eval_tasks.scoring import SCORE

from ..errors import ConfigError
from ..evaluation.report import NOISE_MARK
from ..evaluation.statistics import CONFIDENCE, DRAWS, holm, percentile_interval
from ..evaluation.subjects import BASE
from ..lookup import unknown_name_message
from .compare import (
    common_tasks,
    left_out_note,
    measure_all,
    show_interval,
    table_of,
)
from .runs import Run

if TYPE_CHECKING:
    from ..tables import PlainTable


@dataclass(frozen=True)
class SeedMean:
    """What one recipe came out at on one task or group.

    Attributes:
        scores: of each seed (k,), k at least 2.
        mean: over the seeds.
        std: their sample standard deviation.
        low: lower end of the mean's 95 % t interval.
        high: upper end.
    """

    scores: tuple[float, ...]
    mean: float
    std: float
    low: float
    high: float


@dataclass(frozen=True)
class SeedDifference:
    """The mean of a recipe minus that of the reference.

    Attributes:
        value: the difference.
        low: lower end of Welch's 95 % interval: other seeds, on these very rows.
        high: upper end.
        p_value: of Welch's two-sided t-test.
        rows_low: lower end of the 95 % bootstrap interval: other seeds and other rows.
        rows_high: upper end.
    """

    value: float
    low: float
    high: float
    p_value: float
    rows_low: float
    rows_high: float

    @property
    def within_noise(self) -> bool:
        """Whether one of the intervals holds 0."""
        return self.low <= 0 <= self.high or self.rows_low <= 0 <= self.rows_high


@dataclass(frozen=True)
class SeedComparison:
    """Recipes over their training seeds.

    Attributes:
        recipes: by name the files of its runs, one per seed.
        reference: the recipe that the others are compared with.
        means: by task or group and recipe.
        differences: by task or group and recipe, without the reference.
        left_out: tasks that some run lacks.
        adjusted: by task or group and recipe the p-value after Holm's adjustment for all of them.
    """

    recipes: dict[str, tuple[Path, ...]]
    reference: str
    means: dict[str, dict[str, SeedMean]]
    differences: dict[str, dict[str, SeedDifference]]
    left_out: tuple[str, ...] = ()
    adjusted: dict[tuple[str, str], float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        tests = {
            (task, recipe): difference.p_value
            for task, by_recipe in self.differences.items()
            for recipe, difference in by_recipe.items()
        }
        object.__setattr__(self, "adjusted", holm(tests))

    def tables(self) -> list[PlainTable]:
        """For the terminal, in points (times 100)."""
        means = table_of(
            "Scores x 100 over training seeds",
            *("Task", "Recipe", ">Seeds", ">Mean", ">SD", ">95 % of the mean"),
        )
        for task, by_recipe in self.means.items():
            means.add_section()
            for recipe, one in by_recipe.items():
                means.add_row(
                    task if recipe == next(iter(by_recipe)) else "",
                    recipe,
                    str(len(one.scores)),
                    f"{100 * one.mean:.2f}",
                    f"{100 * one.std:.2f}",
                    f"[{100 * one.low:.2f}, {100 * one.high:.2f}]",
                )
        if len(self.recipes) == 1:
            return [means]
        p = "p (Holm)" if len(self.adjusted) > 1 else "p"
        differences = table_of(
            f"Difference from {self.reference}, with 95 % intervals, {NOISE_MARK} within noise",
            *("Task", "Recipe", ">Difference", ">Other seeds", ">Other seeds and rows", f">{p}"),
        )
        for task, others in self.differences.items():
            for recipe, difference in others.items():
                mark = f"{NOISE_MARK} " if difference.within_noise else ""
                differences.add_row(
                    task if recipe == next(iter(others)) else "",
                    recipe,
                    f"{mark}{100 * difference.value:+.2f}",
                    show_interval(difference.low, difference.high),
                    show_interval(difference.rows_low, difference.rows_high),
                    f"{self.adjusted[task, recipe]:.2g}",
                )
        return [means, differences]

    @property
    def warnings(self) -> list[str]:
        """What must be known beside the tables, a sentence each."""
        return left_out_note(self.left_out)

    def to_dict(self) -> dict[str, Any]:
        """The content of the JSON file."""
        return {
            "recipes": {name: list(map(str, paths)) for name, paths in self.recipes.items()},
            "reference": self.reference,
            "means": {
                task: {recipe: vars(one) for recipe, one in by_recipe.items()}
                for task, by_recipe in self.means.items()
            },
            "differences": {
                task: {
                    recipe: {
                        **vars(one),
                        "p_value_holm": self.adjusted[task, recipe],
                        "within_noise": one.within_noise,
                        "confidence": CONFIDENCE,
                    }
                    for recipe, one in by_recipe.items()
                }
                for task, by_recipe in self.differences.items()
            },
            "left_out": list(self.left_out),
        }


def compare_seeds(
    recipes: Mapping[str, Sequence[Run]], reference: str | None = None, seed: int = 0
) -> SeedComparison:
    """Sum up each recipe over its seeds, and compare the recipes with one of them.

    Two intervals are given for a difference, as they answer two questions. Welch's takes the
    scores of the seeds as independent and roughly normal draws and asks what other seeds would
    score on the same rows. The bootstrap draws rows and seeds independently of each other and asks
    about other rows too. Of k seeds it draws k - 1, which makes the variance of their mean unbiased
    (Rao and Wu, *JASA* 83, 1988), as k of k would make it too small by the factor (k - 1) / k;
    crossing rows and seeds is slightly conservative (Owen, *Annals of Applied Statistics* 1, 2007,
    "The pigeonhole bootstrap"). With two or three seeds its interval is rough; Welch's t knows it.

    Args:
        recipes: by name the runs of one recipe, one adapter each, that differ in the training seed.
        reference: name of a recipe; None takes the first.
        seed: of the bootstrap.

    Raises:
        ConfigError: a recipe has one run only, a run has no adapter or several, the runs have no
            task in common or were not scored on the same rows, or none is called `reference`.
    """
    if reference is None:
        reference = next(iter(recipes))
    elif reference not in recipes:
        raise ConfigError(unknown_name_message("recipe", reference, recipes))
    models: dict[str, dict[str, tuple[Run, str]]] = {}
    for name, runs in recipes.items():
        if len(runs) < 2:
            raise ConfigError(
                f"{name} has one run, and how much seeds differ takes two or more; add the run of "
                f"another training seed as {name}=RUN."
            )
        models[name] = {f"{name} {index}": (run, _adapter(run)) for index, run in enumerate(runs)}
    every = {key: one for by_seed in models.values() for key, one in by_seed.items()}
    tasks, left_out = common_tasks({str(run.path): run for run, _ in every.values()})
    measured, groups = measure_all(every, tasks, None, seed)
    means: dict[str, dict[str, SeedMean]] = {}
    differences: dict[str, dict[str, SeedDifference]] = {}
    for task, one in {**measured, **groups}.items():
        means[task], drawn = {}, {}
        for name, keys in models.items():
            means[task][name] = seed_mean([one.metrics[key][SCORE].value for key in keys])
            drawn[name] = draw_means(np.stack([one.draws[key] for key in keys]), seed, name)
        differences[task] = {
            name: seed_difference(
                means[task][name].scores,
                means[task][reference].scores,
                drawn[name] - drawn[reference],
            )
            for name in recipes
            if name != reference
        }
    files = {name: tuple(run.path for run in runs) for name, runs in recipes.items()}
    return SeedComparison(files, reference, means, differences, left_out)


def seed_mean(scores: Sequence[float]) -> SeedMean:
    """Mean, standard deviation and t interval of the scores of several seeds."""
    from scipy.stats import t

    mean, std = float(np.mean(scores)), float(np.std(scores, ddof=1))
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(scores) - 1)) * std / np.sqrt(len(scores))
    return SeedMean(tuple(scores), mean, std, mean - half, mean + half)


def seed_difference(
    scores: Sequence[float], others: Sequence[float], draws: Array
) -> SeedDifference:
    """Welch's test and interval (*Biometrika* 34, 1947), and the interval of the bootstrap.

    Args:
        scores: of each seed.
        others: of each seed of the reference.
        draws: the difference of the means on each draw of seeds and rows, (DRAWS,).
    """
    from scipy.stats import t

    value = float(np.mean(scores) - np.mean(others))
    rows = percentile_interval(draws)
    one, other = (float(np.var(of, ddof=1)) / len(of) for of in (scores, others))
    stderr = np.sqrt(one + other)
    if stderr == 0:  # the seeds agree to the last row: no noise to test against
        return SeedDifference(value, value, value, float(value == 0), *rows)
    df = (one + other) ** 2 / (one**2 / (len(scores) - 1) + other**2 / (len(others) - 1))
    half = float(t.ppf((1 + CONFIDENCE) / 2, df) * stderr)
    p_value = float(2 * t.sf(abs(value) / stderr, df))
    return SeedDifference(value, value - half, value + half, p_value, *rows)


def draw_means(draws: Array, seed: int, recipe: str) -> Array:
    """A recipe's mean over k - 1 of its k seeds, drawn anew for each draw of rows.

    The same seeds are drawn for every task, so that the draws of groups go together.

    Args:
        draws: each seed's score on each draw of rows, (k, DRAWS).
        seed: of the draws.
        recipe: its name, which gives it a stream of its own.
    """
    rng = np.random.default_rng([seed, zlib.crc32(recipe.encode(errors="surrogatepass"))])
    chosen = rng.integers(len(draws), size=(len(draws) - 1, DRAWS))
    return np.asarray(np.take_along_axis(draws, chosen, axis=0).mean(axis=0))


def _adapter(run: Run) -> str:
    """The one model of a run that is not the base."""
    (rows, *_) = run.predictions.values()
    adapters = [model for model in rows.preds if model != BASE]
    if len(adapters) != 1:
        raise ConfigError(
            f"{run.path} holds {len(adapters)} adapters and stands for one training seed; evaluate "
            "each adapter in a run of its own."
        )
    return adapters[0]
