"""Two processes share the rows and come to the scores of one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from task_rows import ROWS, write_data, write_split

from moelora_plugin.evaluation import EvaluationRequest, evaluate

# Two processes that import torch, transformers and lm-eval.
pytestmark = pytest.mark.slow

TASKS = ("sst2", "stsb", "sst2_gen", "wnli")


def in_two_processes(launcher: tuple[str, ...], *arguments: str) -> Any:
    return subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "moelora_cli", "eval", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """An odd number of rows in one task, and fewer rows than processes in another."""
    folder = write_data(tmp_path / "rows", ["sst2", "stsb", "rte"])
    assert len(ROWS["stsb"]) % 2 == 1
    write_split(folder, "wnli", "validation", ROWS["wnli"][:1])
    return str(folder)


def test_two_processes_score_as_one(
    adapter_folder: str, rows: str, output: Path, tmp_path: Path
) -> None:
    one = evaluate(
        EvaluationRequest(
            tasks=TASKS,
            adapters=(adapter_folder,),
            compare_base=True,
            data_dir=rows,
            device="cpu",
            output=tmp_path / "one.json",
            cache=False,
        )
    )
    options = ["--adapter", adapter_folder, "--compare-base", "--data-dir", rows]
    options += ["--tasks", ",".join(TASKS), "--device", "cpu", "--output", str(output)]
    done = in_two_processes(ACCELERATE, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Written to") == 1
    assert done.stderr.count("base  stsb  ") == 1
    content = json.loads(output.read_text())
    assert content["processes"] == 2
    assert content["from_cache"] == {"base": [], "adapter": []}
    for task in TASKS:
        two = content["predictions"][task]
        assert two["prompts_sha256"] == one.predictions["base"][task].prompts_sha256
        for model, by_task in one.predictions.items():
            assert two["label"] == by_task[task].label.tolist()
            # Padding changes a rating by rounding (fp32), the others not at all.
            tolerance = 1e-5 if task == "stsb" else 0
            np.testing.assert_allclose(two["models"][model], by_task[task].pred, atol=tolerance)

    again = in_two_processes(TORCHRUN, *options, "--overwrite")
    assert again.returncode == 0, again.stderr
    kept = json.loads(output.read_text())
    assert kept["from_cache"] == {model: list(TASKS) for model in ("base", "adapter")}
    assert kept["predictions"] == content["predictions"]


def test_an_error_is_said_once_and_leaves_no_file(
    base_folder: str, rows: str, output: Path
) -> None:
    write_split(Path(rows), "rte", "validation", [{"sentence1": "One.", "label": 1}])
    done = in_two_processes(
        TORCHRUN,
        *("--base", base_folder, "--tasks", "rte", "--data-dir", rows, "--output", str(output)),
    )
    assert done.returncode != 0
    assert done.stderr.count("Error: Column 'sentence2' is missing") == 1
    assert not output.exists()


def test_one_device_for_two_processes_is_refused(base_folder: str, rows: str) -> None:
    done = in_two_processes(
        TORCHRUN,
        *("--base", base_folder, "--tasks", "rte", "--data-dir", rows, "--device", "cuda:0"),
    )
    assert done.stderr.count("Error: --device cuda:0 is one device for 2 processes") == 1
