"""The benchmarks' plumbing at tiny sizes; nothing here looks at a clock."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from tiny import tiny_llama
from torch import nn

FOLDER = Path(__file__).parents[1] / "benchmarks"
NAMES = [file.stem for file in FOLDER.glob("*.py")]


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if from a script in the folder; what was imported from there goes away again."""
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for name in NAMES:
        sys.modules.pop(name, None)


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


def settings(**values):
    return load("timing").Settings(threads=1, rounds=1, **values)


def test_candidates_take_turns_and_slow_ones_sit_out():
    timing = load("timing")
    called: list[str] = []
    candidates = {name: lambda n=name: called.append(n) for name in ("a", "b", "slow")}

    times = timing.interleave(
        candidates, timing.Settings(threads=1, rounds=6), seldom=("slow",), warm_up=2
    )

    assert times.rounds == 6
    assert called.count("a") == called.count("b") == 8
    assert called.count("slow") == 3  # one warm-up round, rounds 0 and 5
    assert np.isnan(times.seconds["slow"]).tolist() == [False, True, True, True, True, False]


def test_ratios_are_of_medians_with_the_base_taken_off():
    timing = load("timing")
    times = timing.Times(
        {"base": [1.0, 1.0, 9.0], "ours": [3.0, 3.0, 11.0], "lora": [2.0, 2.0, 10.0]}
    )

    row = times.compare("layer", "ours", "lora", "base", at_most=1.9)

    assert row.ratio.value == row.ratio.low == row.ratio.high == 2.0
    assert row.met is False
    assert (row.ours, row.theirs) == ("2.00 s", "1.00 s")
    faster = times.compare("layer", "lora", "ours", "base", theirs_over_ours=True, at_least=2)
    assert faster.met is True
    assert times.compare("layer", "ours", "lora").met is None


def test_a_slow_candidate_counts_in_the_rounds_it_took_part_in():
    no = float("nan")
    times = load("timing").Times(
        {"base": [1.0, 2.0, 1.0], "a": [2.0, 3.0, 3.0], "slow": [5.0, no, no]}
    )

    assert times.ratio("slow", "a", "base").value == 4.0
    assert times.median("slow", "base") == 4.0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_a_gpu_would_need_is_left_out_with_a_reason(device):
    there = settings(device=device)
    names = {"cpu": ["gpu_step"], "cuda": ["startup", "moepeft"]}[device]

    for name in names:
        result = load(name).measure(there)
        assert not result.comparisons
        assert all(reason for reason in result.left_out.values())
        assert result.left_out


def test_layer_and_growth_and_memory_measure_a_small_layer():
    layer = load("layer").measure(settings(), sizes=[16], width=32)
    assert [row.against for row in layer.comparisons] == [
        "LoRA r 80",
        "loop over experts",
        "einsum over stacked experts",
    ]
    growth = load("growth").measure(settings(quick=True), tokens=16, width=32)
    assert [row.at_most for row in growth.comparisons] == [2.0]
    memory = load("memory").measure(settings(), tokens=512, width=256)
    assert [row.what.partition(",")[0] for row in memory.comparisons] == ["saved", "peak"] * 2


def test_published_forms_compute_what_the_adapter_computes():
    subjects, layer = load("subjects"), load("layer")
    base = subjects.Base(32)
    ours = subjects.adapted(base, subjects.mixture(["linear"], lora_alpha=4), settings())
    theirs = layer.Loop(base, settings(), 32), layer.Stacked(base, settings(), 32)
    tensors = dict(ours.named_parameters())
    for published in theirs:
        for name, parameter in (
            ("A", published.a),
            ("B", published.b),
            ("gate", published.gate.weight),
        ):
            (found,) = [value for key, value in tensors.items() if f"moelora_{name}." in key]
            parameter.data = found.data
    x = torch.randn(2, 8, 32)

    for published in theirs:
        # fp32 sums over 32 inputs and 80 ranks in another order
        torch.testing.assert_close(published(x), ours(x), atol=1e-5, rtol=1e-5)


def test_kept_bytes_are_distinct_storages_without_parameters():
    memory, subjects = load("memory"), load("subjects")
    x = torch.randn(4, 16, requires_grad=True)

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ self.weight) * x  # keeps x twice, the weight, and the product

    assert memory.saved_bytes(Square(), x, settings()) == 2 * x.nbytes
    lora = subjects.adapted(subjects.Base(16), subjects.lora(["linear"], rank=2), settings())
    # LoRA keeps x and A x
    assert memory.saved_bytes(lora, x, settings()) == x.nbytes + 4 * 2 * 4


def test_peak_counts_what_is_alive_at_once():
    def two_at_once() -> None:
        first = torch.empty(1000, 250)
        second = torch.empty(1000, 250)
        del first
        third = torch.empty(1000, 250)
        del second, third

    # two of three megabytes, and at most some bytes of bookkeeping
    assert 2_000_000 <= load("memory").peak_bytes(two_at_once, "cpu") <= 2_010_000


def test_step_decode_and_gpu_step_run_on_a_small_model():
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
    steps = load("step").measure(settings(quick=True), tiny_llama(), batch=8, length=4)
    assert [row.at_most for row in steps.comparisons] == [1.05, 1.05]
    assert "X-LoRA" in steps.left_out
    decoded = load("decode").measure(settings(), tiny_llama(), new=4)
    assert decoded.comparisons[0].ours.endswith("tokens/s")
    gpu_step = load("gpu_step")
    gpu_step.product_rate = lambda settings: 1e12
    (row,) = gpu_step.steps(settings(), small, 2, 4).comparisons
    assert row.against == "LoRA r 80"


def test_x_lora_of_both_kinds_steps(tmp_path):
    step = load("step")
    tokens = torch.randint(512, (2, 4))

    for model in step.xloras(tiny_llama(), tmp_path, settings()):
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained
        assert not [name for name in trained if "_B." in name]  # the adapters are frozen
        step.step(model, step.adamw(model), tokens, settings())()


def test_one_failure_does_not_lose_the_others(tmp_path, capsys):
    report, timing = load("report"), load("timing")

    def broken(settings):
        raise RuntimeError("no such thing")

    def fine(settings):
        row = timing.Comparison("a", "1 ms", "b", "2 ms", timing.Ratio(0.5, 0.4, 0.6), at_most=1.0)
        return timing.Result([row], {"a": 0.001}, {"a": 3}, {"c": "no network"})

    file = tmp_path / "new" / "bench.json"
    options = timing.parser("").parse_args(["--json", str(file), "--threads", "1"])

    assert not report.run({"broken": broken, "fine": fine}, options)

    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["machine"]["versions"]["torch"] == torch.__version__
    assert found["measurements"]["fine"]["comparisons"][0]["met"] is True
    assert "no such thing" in found["measurements"]["broken"]["left_out"]["broken"]
    out = capsys.readouterr().out
    assert "0.50 x (0.40 to 0.60)" in out
    assert "not measured: c: no network" in out


def test_markdown_has_a_row_for_each_comparison(capsys):
    report, timing = load("report"), load("timing")
    row = timing.Comparison("a", "1 ms", "b", "2 ms", timing.Ratio(12.0, 12.0, 12.0), at_least=10)
    options = timing.parser("").parse_args(["--markdown", "--threads", "1"])

    assert report.run({"one": lambda settings: timing.Result([row])}, options)

    assert (
        "| one: a | 1 ms | b | 2 ms | 12.0 x | at least 10.0 x | yes |" in capsys.readouterr().out
    )


def test_a_misspelt_measurement_is_offered_the_nearest():
    with pytest.raises(SystemExit, match="did you mean layer"):
        load("run").chosen("layr")


def test_every_measurement_has_a_file_of_its_own():
    run = load("run")
    assert set(run.MEASUREMENTS) <= set(NAMES)
    assert all(callable(measure) for measure in run.chosen(None).values())
