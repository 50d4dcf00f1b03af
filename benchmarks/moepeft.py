"""MoE-PEFT 2.0.2's layers beside ours, each over PEFT's LoRA of the same total rank.

    python benchmarks/moepeft.py [--setup]

MoE-PEFT wants torch below 2.6 and transformers below 4.47, so it runs in an environment of its own,
without what it declares: this torch, transformers 4.46.3 and what its modules import. `--setup`
makes the environment (1.5 GB in ~/.cache/moelora/bench) and measures nothing; a measurement makes
it where it is missing. In each environment a layer and LoRA take turns, and what is compared is how
many times LoRA's adapter part a mixture costs. MoLA is a mixture in a linear, MixLoRA one over a
whole feed-forward block.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import torch
from report import run
from subjects import Base, adapted, forward_backward, layer_input, lora, mixture
from timing import Comparison, Ratio, Result, Settings, Times, interleave, parser
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

TORCH = torch.__version__.partition("+")[0]
# None of the first asks for another torch; the second name versions of what is there.
PACKAGES = ("transformers==4.46.3", "datasets", "evaluate", "accelerate", "psutil")
WITHOUT_DEPENDENCIES = ("moe_peft==2.0.2", "peft==0.14.0")

CASES: tuple[dict[str, Any], ...] = (
    {"kind": "MoLA", "experts": 20, "top_k": 10, "rank": 4, "width": 2048, "tokens": 512},
    {"kind": "MoLA", "experts": 20, "top_k": 10, "rank": 4, "width": 2048, "tokens": 2048},
    {
        "kind": "MixLoRA",
        "experts": 8,
        "top_k": 2,
        "rank": 16,
        "width": 1024,
        "hidden": 2816,
        "tokens": 1024,
    },
)
PROJECTIONS = ["gate_proj", "up_proj", "down_proj"]


class Block(nn.Module):
    """A frozen feed-forward block, where our site "block" finds it."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.mlp = LlamaMLP(LlamaConfig(hidden_size=width, intermediate_size=hidden))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Through the block."""
        return self.mlp(x)


def measure(settings: Settings, cases: tuple[dict[str, Any], ...] = CASES) -> Result:
    """Both environments, case by case."""
    if settings.device != "cpu":
        return Result(left_out={"MoE-PEFT": "it is compared on the CPU only"})
    if settings.quick:
        return Result(left_out={"MoE-PEFT": "not part of --quick"})
    named = {_name(case): case for case in cases}
    result = Result()
    try:
        settings.say("making the environment")
        python = environment()
    except (OSError, subprocess.CalledProcessError) as error:
        reason = _reason(error)
        result.left_out["MoE-PEFT"] = f"its environment could not be made: {reason}"
        return result
    for name, case in named.items():
        settings.say(f"{name}, MoE-PEFT")
        try:
            theirs = inside(python, name, case, settings)
        except subprocess.CalledProcessError as error:
            result.left_out[name] = f"MoE-PEFT failed on torch {TORCH}: {_reason(error)}"
            continue
        ours = outside(name, case, settings)
        result.add(f"{name}, MoE-PEFT's environment", theirs)
        result.add(f"{name}, ours", ours)
        mine = ours.ratio("moelora", "lora", "base")
        other = theirs.ratio("theirs", "lora", "base")
        result.comparisons.append(
            Comparison(
                name,
                f"{mine.value:.2f} x LoRA",
                "MoE-PEFT",
                f"{other.value:.1f} x LoRA",
                Ratio(other.value / mine.value, other.low / mine.high, other.high / mine.low),
            )
        )
    return result


def outside(name: str, case: dict[str, Any], settings: Settings) -> Times:
    """Ours beside LoRA."""
    sizes = {"num_experts": case["experts"], "top_k": case["top_k"], "r": case["rank"]}
    rank = case["experts"] * case["rank"]
    base: nn.Module
    if case["kind"] == "MoLA":
        base, targets, site = Base(case["width"]), ["linear"], "linear"
    else:
        base, targets, site = Block(case["width"], case["hidden"]), PROJECTIONS, "block"
    x, upstream = layer_input(case["tokens"], settings, case["width"])
    layers = {
        "base": base,
        "moelora": adapted(base, mixture(targets, site=site, **sizes), settings),
        "lora": adapted(base, lora(targets, rank), settings),
    }
    return interleave(
        {key: forward_backward(layer, x, upstream, settings) for key, layer in layers.items()},
        settings,
        label=f"{name}, ours",
    )


def inside(python: Path, name: str, case: dict[str, Any], settings: Settings) -> Times:
    """Theirs beside LoRA, in the other environment."""
    given = {
        "threads": settings.threads,
        "quick": settings.quick,
        "rounds": settings.rounds,
        "cases": [{"name": name} | case],
    }
    script = Path(__file__).with_name("moepeft_inside.py")
    done = subprocess.run(
        [str(python), str(script), json.dumps(given)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(settings.threads)},
    )
    return Times(json.loads(done.stdout.splitlines()[-1])[name])


def environment() -> Path:
    """The Python of MoE-PEFT's environment, which is made where it is missing."""
    root = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "moelora" / "bench"
    folder = root / f"moe_peft-2.0.2-torch-{TORCH}-python-{platform.python_version()}"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for arguments in (
            [f"torch=={TORCH}"],  # first and alone: a machine may offer a build of its own
            [f"torch=={TORCH}", *PACKAGES],
            ["--no-deps", *WITHOUT_DEPENDENCIES],
        ):
            subprocess.run([*pip, *arguments], check=True, capture_output=True, text=True)
        (folder / "ready").touch()
    return python


def _name(case: dict[str, Any]) -> str:
    sizes = f"{case['experts']}/{case['top_k']}/{case['rank']}"
    return f"{case['kind']} {sizes}, {case['tokens']} tokens"


def _reason(error: Exception) -> str:
    """The last line that says something."""
    text = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--setup", action="store_true", help="make the environment only")
    parsed = options.parse_args()
    if parsed.setup:
        print(environment())
        sys.exit()
    run({"moepeft": measure}, parsed)
