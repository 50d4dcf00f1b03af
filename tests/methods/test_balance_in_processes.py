"""The balance bias of two processes is that of one which routes the rows of both.

The file is a script as well, which each process runs; it imports no more than torch, so that they
start quickly.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from route_rows import make_modifiers, make_router, route_rows
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

# Two processes that import torch.
pytestmark = pytest.mark.slow


class Routed(nn.Module):
    """A gate, a router and its modifiers, told about each call as a model tells its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.modifiers = make_router("topk", 4), make_modifiers(4, balance_bias=0.1)
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 4, generator=generator, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.modifiers.before_call()
        return route_rows(self.router, x, self.weight, self.modifiers).weights


def rows_of(step: int, process: int) -> torch.Tensor:
    """The second process has five times the rows of the first, and another favourite."""
    generator = torch.Generator().manual_seed(10 * step + process)
    rows = torch.randn(10 if process else 2, 4, generator=generator, dtype=torch.float64)
    rows[:, process] += 2
    return rows


def route_in_process(store: str, process: int) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=process, world_size=2
    )
    module = Routed()
    wrapped = DistributedDataParallel(module)
    for step in range(4):
        wrapped(rows_of(step, process)).square().sum().backward()
    print(module.modifiers.balance_moves.tolist())
    distributed.destroy_process_group()


def test_balance_bias_is_one_over_all_processes(tmp_path):
    """The same as one process that routes the rows of both."""
    command = [sys.executable, __file__, str(tmp_path / "store")]
    paths = [str(Path(__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    processes = [
        subprocess.Popen([*command, str(process)], stdout=subprocess.PIPE, env=environment)
        for process in (0, 1)
    ]
    found = [json.loads(process.communicate(timeout=300)[0]) for process in processes]
    module = Routed()
    for step in range(4):
        module(torch.cat([rows_of(step, process) for process in (0, 1)]))
    expected = module.modifiers.balance_moves.tolist()
    assert found == [expected, expected]
    alone = Routed()
    for step in range(4):
        alone(rows_of(step, 0))
    assert alone.modifiers.balance_moves.tolist() != expected


if __name__ == "__main__":
    route_in_process(sys.argv[1], int(sys.argv[2]))
