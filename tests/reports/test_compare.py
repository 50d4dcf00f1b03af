"""Models of several runs on the same rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from written_runs import ROWS, write_run

from moelora_eval_tasks.catalog import GROUPS, TASKS
from moelora_plugin.errors import ConfigError
from moelora_plugin.evaluation.statistics import measure
from moelora_plugin.reports.compare import Comparison, compare, read_runs


def _compare(*arguments: Path | str, reference: str | None = None) -> Comparison:
    runs = read_runs(list(map(str, arguments)))
    return compare({name: run for name, (run,) in runs.items()}, reference)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_run(tmp_path / "good", {"base": 0.6, "adapter": 0.9})


@pytest.fixture
def poor(tmp_path: Path) -> Path:
    return write_run(tmp_path / "poor", {"base": 0.6, "adapter": 0.6}, seed=2)


def test_models_of_two_runs_are_compared_row_by_row(good: Path, poor: Path) -> None:
    found = _compare(good, poor, reference="poor")
    runs = read_runs([str(good), str(poor)])
    preds = {
        "base": runs["good"][0].predictions["rte"].preds["base"],
        "good": runs["good"][0].predictions["rte"].preds["adapter"],
        "poor": runs["poor"][0].predictions["rte"].preds["adapter"],
    }
    label = runs["good"][0].predictions["rte"].label
    assert found.tasks["rte"] == measure(TASKS["rte"], label, preds, "poor")
    assert {name: (run.path.parent, model) for name, (run, model) in found.models.items()} == {
        "base": (good, "base"),
        "good": (good, "adapter"),
        "poor": (poor, "adapter"),
    }


def test_the_base_is_the_reference_unless_told_otherwise(good: Path, tmp_path: Path) -> None:
    assert _compare(good).reference == "base"
    other = write_run(tmp_path / "other", {"adapter": 0.7})
    assert _compare(other, good).reference == "base"
    another = write_run(tmp_path / "another", {"adapter": 0.8})
    assert _compare(other, another).reference == "other"


def test_p_values_are_adjusted_for_all_of_them(good: Path, poor: Path) -> None:
    found = _compare(good, poor)
    raw = {
        (task, model): one.p_value
        for task, measured in found.tasks.items()
        for model, one in measured.differences.items()
    }
    assert set(found.adjusted) == set(raw)
    assert len(raw) == 4
    least = min(raw, key=lambda key: float(raw[key] or 0))
    assert found.adjusted[least] == pytest.approx(4 * float(raw[least] or 0))
    written = found.to_dict()["tasks"][least[0]]["differences"][least[1]]
    assert written["p_value_holm"] == found.adjusted[least]


def test_names_tell_models_apart(tmp_path: Path) -> None:
    shares = {"base": 0.6, "x": 0.7, "y": 0.8}
    one = write_run(tmp_path / "a" / "run", shares)
    two = write_run(tmp_path / "b" / "run", shares, seed=3)
    assert list(_compare(one).models) == ["base", "x", "y"]
    models = list(_compare(one, f"mine={two}").models)
    assert models == ["base", "run/x", "run/y", "mine/x", "mine/y"]
    assert list(read_runs([str(one), str(two)])) == ["a/run", "b/run"]
    only_base = write_run(tmp_path / "base", {"base": 0.6})
    assert next(iter(_compare(only_base, f"base2={one}").models)) == "base"


def test_a_file_of_another_name_gives_its_own(good: Path) -> None:
    file = (good / "moelora_eval.json").rename(good / "second.json")
    assert list(read_runs([str(file)])) == ["second"]


def test_bases_that_answer_differently_are_two(good: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", {"base": 0.9, "adapter": 0.9})
    assert list(_compare(good, other).models) == ["good/base", "good", "other/base", "other"]
    assert _compare(good, other).reference == "good/base"


def test_tasks_that_a_run_lacks_are_left_out(good: Path, tmp_path: Path) -> None:
    more = write_run(tmp_path / "more", {"adapter": 0.7}, tasks=("sst2", "rte", "wnli"))
    found = _compare(good, more)
    assert (list(found.tasks), found.left_out) == (["sst2", "rte"], ("wnli",))
    assert "Left out, as not all runs have them: wnli." in found.warnings
    apart = write_run(tmp_path / "apart", {"adapter": 0.7}, tasks=("wnli",))
    with pytest.raises(ConfigError, match=r"^The runs have no task in common; name runs of"):
        _compare(good, apart)


def test_groups_that_all_runs_have_are_compared(tmp_path: Path) -> None:
    tasks = GROUPS["qa"]
    first = write_run(tmp_path / "a", {"base": 0.6, "adapter": 0.7}, tasks, groups=("qa",))
    second = write_run(tmp_path / "b", {"adapter": 0.8}, tasks, groups=("qa",))
    found = _compare(first, second)
    mean = np.mean([found.tasks[task].differences["b"].value for task in tasks])
    assert found.groups["qa"].differences["b"].value == pytest.approx(mean)
    without = write_run(tmp_path / "c", {"adapter": 0.8}, tasks)
    assert not _compare(first, without).groups


@pytest.mark.parametrize("name", ["text", "a_group_of_the_past"])
def test_groups_of_another_version_are_left_out(name: str, good: Path) -> None:
    file = good / "moelora_eval.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["groups"] = {name: content["tasks"]["rte"]}
    file.write_text(json.dumps(content), encoding="utf-8")
    assert not _compare(good).groups


@pytest.mark.parametrize("change", [{"rows": ROWS - 1}, {"prompts": "1" * 64}])
def test_other_rows_or_prompts_are_refused(
    change: dict[str, int | str], good: Path, tmp_path: Path
) -> None:
    other = write_run(tmp_path / "other", {"adapter": 0.7}, **change)  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"^good and other were not scored on the same rows and prompts of sst2"
    ):
        _compare(good, other)


def test_what_must_be_known_of_the_runs_is_noted(good: Path, tmp_path: Path) -> None:
    details = {"request": {"limit": 120}, "overlap": {"adapter": {"rte": 7}}}
    other = write_run(tmp_path / "other", {"adapter": 0.7}, details=details)
    notes = _compare(other, good).warnings
    assert [note.partition(" ")[0] for note in notes] == ["At", "Rows", "Within"]
    assert "other on rte (7)." in notes[1]


def test_bad_names_are_refused(good: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^Unknown model 'bas'; did you mean 'base'\?"):
        _compare(good, reference="bas")
    with pytest.raises(ConfigError, match=r"moelora_eval\.json is given twice; name each run once"):
        _compare(good, f"again={good}/moelora_eval.json")
    alone = write_run(tmp_path / "alone", {"adapter": 0.7})
    with pytest.raises(ConfigError, match=r"^There is nothing to compare adapter with; name more"):
        _compare(alone)
