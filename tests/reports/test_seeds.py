"""Recipes over several training seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_1samp, ttest_ind
from written_runs import write_run

from moelora_eval_tasks.catalog import GROUPS
from moelora_plugin.errors import ConfigError
from moelora_plugin.evaluation.statistics import DRAWS
from moelora_plugin.reports.compare import read_runs
from moelora_plugin.reports.seeds import (
    SeedComparison,
    compare_seeds,
    draw_means,
    seed_difference,
    seed_mean,
)

OURS, LORA = (0.81, 0.84, 0.78, 0.83), (0.80, 0.79, 0.76)


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    return [
        f"{recipe}={write_run(tmp_path / f'{recipe}{seed}', {'adapter': share}, seed=seed)}"
        for recipe, share, seeds in (("ours", 0.9, (1, 2, 3)), ("lora", 0.7, (4, 5)))
        for seed in seeds
    ]


def test_the_mean_and_its_t_interval() -> None:
    one = seed_mean(OURS)
    interval = ttest_1samp(OURS, 0).confidence_interval()
    assert one.mean == pytest.approx(np.mean(OURS))
    assert one.std == pytest.approx(np.std(OURS, ddof=1))
    assert (one.low, one.high) == pytest.approx((interval.low, interval.high))


def test_welchs_test_and_interval() -> None:
    found = seed_difference(OURS, LORA, np.linspace(-1, 1, DRAWS))
    expected = ttest_ind(OURS, LORA, equal_var=False)
    interval = expected.confidence_interval()
    assert found.value == pytest.approx(np.mean(OURS) - np.mean(LORA))
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert (found.rows_low, found.rows_high) == pytest.approx((-0.95, 0.95))


def test_seeds_that_agree_leave_nothing_to_test() -> None:
    rows = np.linspace(0.1, 0.2, DRAWS)
    apart, equal = (
        seed_difference((0.75, 0.75), other, rows) for other in ((0.5, 0.5), (0.75,) * 3)
    )
    assert (apart.low, apart.high, apart.p_value) == (0.25, 0.25, 0)
    assert (equal.value, equal.p_value) == (0, 1)
    assert equal.within_noise
    assert not apart.within_noise


def test_a_difference_outside_of_one_interval_alone_is_noise() -> None:
    clear, unclear = np.linspace(0.1, 0.2, DRAWS), np.linspace(-0.1, 0.2, DRAWS)
    assert not seed_difference((0.9, 0.91), (0.5, 0.51), clear).within_noise
    assert seed_difference((0.9, 0.91), (0.5, 0.51), unclear).within_noise
    assert seed_difference((0.9, 0.1), (0.5, 0.51), clear).within_noise


def test_the_bootstrap_of_seeds_has_their_variance() -> None:
    """Where all rows are alike, what remains is the variance of a mean of k seeds, s^2 / k."""
    draws = np.repeat(np.array(OURS)[:, None], DRAWS, axis=1)
    found = draw_means(draws, seed=0, recipe="ours").std()
    # Four standard errors of a standard deviation from DRAWS numbers, as in test_statistics.
    expected = np.std(OURS, ddof=1) / np.sqrt(len(OURS))
    assert found == pytest.approx(expected, rel=4 / np.sqrt(2 * DRAWS))


def test_the_bootstrap_of_rows_is_that_of_each_draw() -> None:
    """Where all seeds are alike, each draw of rows keeps its value."""
    rows = np.random.default_rng(0).normal(size=DRAWS)
    np.testing.assert_allclose(draw_means(np.stack([rows] * 3), seed=0, recipe="ours"), rows)


def test_intervals_of_seeds_and_rows_cover_the_truth() -> None:
    """Rows and seeds have effects of their own: 300 simulated sets of 5 against 5 seeds."""
    covered = 0
    simulations, rows, k = 300, 80, 5
    rng = np.random.default_rng(0)
    counts = rng.multinomial(rows, np.full(rows, 1 / rows), size=DRAWS) / rows
    for _ in range(simulations):
        row = rng.normal(size=(2, 1, rows))  # how well each recipe does on each row
        per_seed, noise = rng.normal(size=(2, k, 1)), rng.normal(size=(2, k, rows))
        scores = row + 0.3 * per_seed + 0.3 * noise
        ours, lora = (
            draw_means(of @ counts.T, int(rng.integers(2**31)), name)
            for of, name in zip(scores, ("ours", "lora"), strict=True)
        )
        found = seed_difference(scores[0].mean(axis=1), scores[1].mean(axis=1), ours - lora)
        covered += found.rows_low <= 0 <= found.rows_high
    # 0.95 less 0.02 for so few seeds, and 3 standard deviations of a count of 300, 0.0126 each;
    # crossing rows and seeds errs on the safe side. The rows alone would cover 0.79.
    assert 0.89 <= covered / simulations <= 0.99


def _compare(arguments: list[str], reference: str | None = None) -> SeedComparison:
    return compare_seeds(read_runs(arguments), reference)


def test_runs_of_one_name_are_summed_up(arguments: list[str]) -> None:
    runs = read_runs(arguments)
    found = _compare(arguments, reference="lora")
    scores = {
        recipe: tuple(run.tasks["rte"].metrics["adapter"]["score"].value for run in by_seed)
        for recipe, by_seed in runs.items()
    }
    assert found.means["rte"]["ours"] == seed_mean(scores["ours"])
    difference = found.differences["rte"]["ours"]
    welch = ttest_ind(scores["ours"], scores["lora"], equal_var=False)
    assert difference.p_value == pytest.approx(welch.pvalue)
    assert difference.rows_low < difference.value < difference.rows_high
    assert list(found.differences["rte"]) == ["ours"]
    assert set(found.adjusted) == {("sst2", "ours"), ("rte", "ours")}
    assert max(found.adjusted.values()) >= max(
        one["ours"].p_value for one in found.differences.values()
    )
    assert [len(paths) for paths in found.recipes.values()] == [3, 2]
    assert _compare(arguments).reference == "ours"


def test_groups_are_means_of_each_seed(tmp_path: Path) -> None:
    arguments = [
        f"ours={write_run(tmp_path / f'run{seed}', {'adapter': 0.7}, GROUPS['qa'], ('qa',), seed)}"
        for seed in (1, 2)
    ]
    found = _compare(arguments)
    by_task = [found.means[task]["ours"].scores for task in GROUPS["qa"]]
    assert found.means["qa"]["ours"].scores == pytest.approx(np.mean(by_task, axis=0))
    assert len(found.tables()) == 1
    assert not found.differences["qa"]


def test_what_cannot_be_summed_up_is_refused(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^lora has one run, and how much seeds differ takes two"
    ):
        _compare(arguments[:-1])
    with pytest.raises(ConfigError, match=r"^Unknown recipe 'our'; did you mean 'ours'"):
        _compare(arguments, reference="our")
    two = write_run(tmp_path / "two", {"base": 0.6, "x": 0.7, "y": 0.7})
    with pytest.raises(
        ConfigError, match=r"two/moelora_eval\.json holds 2 adapters and stands for"
    ):
        _compare([*arguments, f"ours={two}"])
    fewer = write_run(tmp_path / "fewer", {"adapter": 0.7}, rows=50)
    with pytest.raises(ConfigError, match=r"were not scored on the same rows and prompts of sst2"):
        _compare([*arguments, f"ours={fewer}"])
