"""Wall time of `moelora eval` with an adapter over that of the bare base.

    python benchmarks/evaluation.py

Whole processes, from the command to the written JSON, on SmolLM2-135M and the film comments that
the demo brings along (lm-eval scores two answers for each). Also the seconds of scoring alone, as
the JSON has them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from report import main
from subjects import ATTENTION, adapted, load_smollm2, mixture, smollm2
from timing import Result, Settings, Times, interleave
from transformers import AutoTokenizer

from moelora_plugin.checkpoint import save_adapter
from moelora_plugin.demo.sources import sst2_folder

ROWS = 100
COMMAND = "from moelora_cli.main import main; main()"


def measure(settings: Settings, rows: int = ROWS) -> Result:
    """The command with and without the adapter."""
    if settings.quick:
        return Result(left_out={"evaluation": "not part of --quick: a run takes seconds to start"})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, _ = sst2_folder(None, False, folder)
        model = adapted(load_smollm2(settings), mixture(ATTENTION), settings)
        save_adapter(model, folder / "adapter", tokenizer=AutoTokenizer.from_pretrained(smollm2()))
        del model
        common = ["--tasks", "sst2", "--data-dir", str(data), "--limit", str(rows)]
        common += ["--device", settings.device]
        scoring: dict[str, list[float]] = {"base": [], "moelora": []}
        times = interleave(
            {
                "base": command([*common, "--base", smollm2()], folder, scoring["base"], settings),
                "moelora": command(
                    [*common, "--adapter", str(folder / "adapter")],
                    folder,
                    scoring["moelora"],
                    settings,
                ),
            },
            settings,
            warm_up=1,  # reads the files once
            label=f"{rows} rows",
        )
    result = Result()
    result.add(f"moelora eval, {rows} rows", times)
    result.add("of which scoring", Times(scoring))
    result.comparisons = [
        times.compare(f"sst2, {rows} rows", "moelora", "base", at_most=1.15),
        Times(scoring).compare("of which scoring", "moelora", "base"),
    ]
    return result


def command(
    arguments: list[str], folder: Path, scoring: list[float], settings: Settings
) -> Callable[[], None]:
    """`moelora eval` with these arguments; the seconds of its JSON are appended to `scoring`."""
    output = folder / "moelora_eval.json"
    call = [sys.executable, "-c", COMMAND, "eval", "--no-cache", *arguments]
    call += ["--output", str(output), "--overwrite"]
    environment = os.environ | {"OMP_NUM_THREADS": str(settings.threads)}

    def run() -> None:
        done = subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"moelora eval failed:\n{done.stderr[-2000:]}")
        scoring.append(json.loads(output.read_text(encoding="utf-8"))["seconds"])

    return run


if __name__ == "__main__":
    main(measure, __file__, __doc__)
