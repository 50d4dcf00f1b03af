"""Goes through every architecture of the installed transformers: `make test-architectures`.

Each runs in a process of its own, forked from one that has everything imported, so that neither a
crash nor a hang ends the others. Writes docs/architectures.md and exits with 1 where anything is at
fault.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import torch
import transformers
from adapter_check import Outcome, architectures, check
from sweep_table import document

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
_FORK = multiprocessing.get_context("fork")


def main() -> int:
    """Run what was asked for; 1 where anything is at fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="model types; all where none is given")
    parser.add_argument("--task", help="causal, encoder, encoder-decoder, vision-text or vision")
    parser.add_argument("--json", type=Path, help="where to write the outcomes as well")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=600, help="for one architecture")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    warnings.simplefilter("ignore")
    chosen = [
        (task, name)
        for task, name in architectures()
        if (not options.names or name in options.names) and options.task in (None, task)
    ]
    with ThreadPoolExecutor(options.workers) as pool:
        found = dict(
            zip(chosen, pool.map(lambda one: apart(*one, options.seconds), chosen), strict=True)
        )
    if options.json:
        rows = [[*key, dataclasses.asdict(outcome)] for key, outcome in found.items()]
        options.json.write_text(json.dumps(rows, indent=1))
    if len(chosen) == len(architectures()):
        PAGE.write_text(document(found), encoding="utf-8")
    counts: dict[str, int] = {}
    for outcome in found.values():
        counts[outcome.status] = counts.get(outcome.status, 0) + 1
    print(counts)
    return 1 if "fault" in counts else 0


def apart(task: str, name: str, seconds: float) -> Outcome:
    """`check` in a process of its own."""
    begin = time.monotonic()
    receive, send = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_child, args=(send, task, name))
    process.start()
    send.close()
    try:
        outcome = receive.recv() if receive.poll(seconds) else Outcome("fault", "it hangs")
    except EOFError:
        process.join()
        outcome = Outcome("fault", f"its process ended with {process.exitcode}")
    process.kill()
    process.join()
    took = time.monotonic() - begin
    print(f"{task:16}{name:32}{outcome.status:10}{took:5.1f}s  {outcome.detail}", flush=True)
    return outcome


def _child(send: Any, task: str, name: str) -> None:
    send.send(check(task, name))


if __name__ == "__main__":
    sys.exit(main())
