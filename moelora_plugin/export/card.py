"""Model cards: what a folder holds, how it came about, how to load it."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..config import MoeLoraConfig
from ..errors import ConfigError
from ..files import sha256_of
from ..manifest import WEIGHTS_FILE, entry
from ..text import code, markdown, plain
from .merged import Merge

_PAPER = "[A Stronger Mixture of Low-Rank Experts](https://arxiv.org/abs/2502.15828) (ICML 2025)"

_MAX_TARGETS = 12
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def read_scores(eval_file: Path | str | None, adapter: Path) -> str:
    """The table of what this adapter, and its reference, came out at in a `moelora_eval.json`.

    Returns:
        Markdown; empty without a file.

    Raises:
        ConfigError: no such file, not such a file, or the scores of something else.
    """
    if eval_file is None:
        return ""
    from ..reports.markdown import score_table
    from ..reports.runs import read_run
    from ..reports.scoreboard import scoreboard

    try:
        run = read_run(eval_file)
    except ConfigError as error:
        raise ConfigError(f"--eval-file {error}") from None
    measured = {
        record.get("sha256", {}).get(WEIGHTS_FILE): model for model, record in run.models.items()
    }
    model = measured.get(sha256_of(adapter / WEIGHTS_FILE))
    if model is None:
        whose = "other weights" if any(measured) else "no saved adapter"
        raise ConfigError(
            f"--eval-file {run.path} holds the scores of {whose}; make one with moelora eval "
            f"--adapter {adapter}."
        )
    return score_table(scoreboard({"": run}), [*([run.reference] if run.reference else []), model])


def adapter_card(config: MoeLoraConfig, manifest: Mapping[str, Any], scores: str) -> str:
    """The card of a shared adapter."""
    base = public_base(config.base_model_name_or_path)
    experts = f"{config.num_experts} per module, top {config.top_k}, rank {config.r} each"
    rescaling = f"{config.gate_rescale} (scope {config.gate_rescale_scope})"
    facts = {
        "Base": code(base),
        "Experts": markdown(f"{experts}, alpha {config.lora_alpha}"),
        "Router": markdown(config.router),
        "Gate rescaling": markdown(rescaling),
        "Target modules": _targets(config.target_modules),
        **_training(manifest),
    }
    return _card(
        base,
        "peft",
        "# MoE-LoRA adapter",
        f"A mixture of LoRA experts, after {_PAPER}, made with moelora.",
        _facts(facts),
        _scores(scores),
        "## Load it\n\n```python\nimport moelora_plugin  # pip install moelora: PEFT learns the "
        "type "
        "MOELORA\nfrom peft import AutoPeftModelForCausalLM\n\nmodel = "
        'AutoPeftModelForCausalLM.from_pretrained("THIS_REPOSITORY")\n```\n\n'
        "Without the package PEFT answers `KeyError: 'MOELORA'`; the adapter never loads as "
        "something else. The gates follow the input, so it cannot be merged exactly; `moelora "
        "export --to merged --strategy mean-gate` writes an approximation.",
    )


def merged_card(base: str, merge: Merge, manifest: Mapping[str, Any], scores: str) -> str:
    """The card of a merged checkpoint."""
    if merge.strategy == "exact":
        how = (
            "The adapter's gates do not depend on the input, so this checkpoint equals it up to "
            "rounding."
        )
    else:
        how = (
            "Every expert has its mean gate over calibration text, so this checkpoint "
            "**approximates** the adapter: the relative error of the logits there is "
            f"{merge.logit_error:.4f}, and that of a layer's update up to "
            f"{max(merge.layer_errors.values(), default=0.0):.4f}. Scores of the adapter are not "
            "scores of this checkpoint."
        )
    return _card(
        public_base(base),
        "transformers",
        "# Merged MoE-LoRA checkpoint",
        f"A MoE-LoRA adapter (after {_PAPER}) folded into its base with moelora, strategy "
        f"`{merge.strategy}`. {how}",
        _facts({"Base": code(public_base(base)), **_training(manifest)}),
        _scores(scores, title="Scores of the unmerged adapter"),
        "## Load it\n\n```python\nfrom transformers import AutoModelForCausalLM\n\nmodel = "
        'AutoModelForCausalLM.from_pretrained("THIS_REPOSITORY")\n```',
    )


def _card(base: str, library: str, *parts: str) -> str:
    # A base that is a folder has no page on the hub to link to, nor has what is no hub id.
    linked = base if _HUB_ID.fullmatch(base) and not os.path.isdir(base) else None
    data = ModelCardData(
        base_model=linked, library_name=library, tags=["moelora", "lora", "mixture-of-experts"]
    )
    return "\n\n".join([f"---\n{data.to_yaml()}\n---", *(part for part in parts if part)]) + "\n"


def public_base(base: Any) -> str:
    """A hub id as it is; of a folder only its name, since its path is nobody else's business."""
    name = plain(base or "unknown")
    return Path(name).name if os.path.isdir(name) or os.path.isabs(name) else name


def _listing(value: Iterable[str] | str | None) -> str:
    names = [value] if isinstance(value, str) else value or []
    return ", ".join(map(code, names))


def _targets(value: Collection[str] | str | None) -> str:
    """PEFT writes "all-linear" out as the full name of every module, which is a page of names."""
    if value is None or isinstance(value, str) or len(value) <= _MAX_TARGETS:
        return _listing(value)
    kinds = {name.rpartition(".")[2] for name in value}
    return f"{_listing(sorted(kinds))} ({len(value)} modules)"


def _training(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What is recorded of it."""
    facts: dict[str, str] = {}
    if (tasks := entry(manifest, "recipe", "data", "tasks")) is not None:
        facts["Trained on"] = _listing(list(tasks))
    if (name := entry(manifest, "recipe", "optimizer", "name")) is not None:
        rates = {"lr": "lr", "gate_lr": "gate lr"}
        found = {said: entry(manifest, "recipe", "optimizer", key) for key, said in rates.items()}
        parts = [name, *(f"{said} {rate:g}" for said, rate in found.items() if rate is not None)]
        facts["Optimizer"] = markdown(", ".join(parts))
    if (steps := entry(manifest, "steps")) is not None:
        facts["Steps"] = f"{steps}"
    if (number := entry(manifest, "trainable_parameters")) is not None:
        facts["Trainable parameters"] = f"{number:,}"
    return facts


def _facts(facts: Mapping[str, str]) -> str:
    return "| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in facts.items())


def _scores(table: str, title: str = "Scores") -> str:
    return f"## {title}\n\n{table}" if table else ""
