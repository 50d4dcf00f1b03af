"""What reads an artefact: every loader, and the commands, each giving an answer to compare."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moelora_cli.main import app
from moelora_plugin import MoeLoraConfig
from moelora_plugin.call import routing_ids
from moelora_plugin.checkpoint import load_adapter
from moelora_plugin.clusters import ClusterAssigner
from moelora_plugin.files import sha256_of
from moelora_plugin.training import load_recipe

from .artefacts import Artefacts

IDS = torch.tensor([[3, 7, 11, 5, 2], [9, 4, 300, 6, 1]])


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        run: what reads the artefact's folder, and its answer: a tensor, a text, or None.
        is_ours: whether every error has to be one of ours; a library's own loader may raise its own
            where we have no part in it.
        compares: whether another answer without a word is a silent change. A command that shows
            what a file says, and a reader of what a person has written, give other answers rightly.
        opens_base: whether the base that the file names is the library's to open, before it asks
            us, also where that is no folder (docs/security.md).
    """

    run: Callable[[Path, Artefacts], Any]
    is_ours: bool = True
    compares: bool = True
    opens_base: bool = False


def _answer(model: Any) -> Tensor:
    cluster = torch.tensor([0, 1])
    with torch.no_grad(), routing_ids(model, cluster_id=cluster):
        logits: Tensor = model.eval()(input_ids=IDS).logits
    return logits


def _load_adapter(folder: Path, artefacts: Artefacts) -> Tensor:
    return _answer(load_adapter(folder, base=copy.deepcopy(artefacts.model))[0])


def _from_pretrained(folder: Path, artefacts: Artefacts) -> Tensor:
    return _answer(PeftModel.from_pretrained(copy.deepcopy(artefacts.model), str(folder)))


def _auto_peft(folder: Path, artefacts: Artefacts) -> Tensor:
    return _answer(AutoPeftModelForCausalLM.from_pretrained(str(folder)))


def _native(folder: Path, artefacts: Artefacts) -> Tensor:
    return _answer(AutoModelForCausalLM.from_pretrained(str(folder)))


def _native_adapter(folder: Path, artefacts: Artefacts) -> Tensor:
    model = copy.deepcopy(artefacts.model)
    model.load_adapter(str(folder))
    return _answer(model)


def _command(*words: str) -> str:
    """What a command prints; its error where it has one that is no exit."""
    result = CliRunner().invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code:
        raise Refused(result.stderr)
    return result.output


class Refused(Exception):
    """A command that ended with one of our errors, which it printed."""


def _inspect(folder: Path, artefacts: Artefacts) -> str:
    return _command("inspect", str(folder))


def _export(folder: Path, artefacts: Artefacts) -> str:
    out = folder.parent / "exported"
    _command("export", str(folder), "--out", str(out))
    return sha256_of(out / "adapter_model.safetensors")


def _merge(folder: Path, artefacts: Artefacts) -> str:
    out = folder.parent / "merged"
    command = (
        f"export {folder} --to merged --strategy mean-gate --calibration-tasks sst2 --out {out}"
    )
    _command(*command.split(), "--data-dir", str(artefacts.folder / "rows"))
    return sha256_of(out / "model.safetensors")


def _evaluate(folder: Path, artefacts: Artefacts) -> None:
    out = folder.parent / "scores.json"
    command = f"eval --adapter {folder} --tasks sst2 --limit 4 --no-cache --output {out}"
    _command(*command.split(), "--data-dir", str(artefacts.folder / "rows"))


def _recipe(folder: Path, artefacts: Artefacts) -> None:
    load_recipe(folder / "recipe.yaml")


def _plan(folder: Path, artefacts: Artefacts) -> str:
    return _command("plan", str(folder / "recipe.yaml"))


def _report(folder: Path, artefacts: Artefacts) -> str:
    page, text = folder.parent / "report.html", folder.parent / "report.md"
    shown = _command("report", str(folder), "--out", str(page), "--markdown", str(text))
    return shown + text.read_text()


def _compare(folder: Path, artefacts: Artefacts) -> str:
    return _command("compare", str(folder))


def _card(folder: Path, artefacts: Artefacts) -> str:
    adapter, out = artefacts.folder / "adapter-plain", folder.parent / "card"
    scores = folder / "moelora_eval.json"
    _command("export", str(adapter), "--out", str(out), "--eval-file", str(scores))
    return (out / "README.md").read_text()


def _assign(folder: Path, artefacts: Artefacts) -> Tensor:
    model = copy.deepcopy(artefacts.model)
    return ClusterAssigner.load(folder, model).assign({"input_ids": IDS})


def _allocate(folder: Path, artefacts: Artefacts) -> None:
    MoeLoraConfig(allocation="modules", allocation_kwargs={"path": str(folder / "allocation.json")})


_ADAPTER = {
    "load_adapter": Target(_load_adapter),
    "PeftModel.from_pretrained": Target(_from_pretrained, is_ours=False),
    "AutoPeftModel": Target(_auto_peft, is_ours=False, opens_base=True),
    "AutoModel.from_pretrained": Target(_native, is_ours=False, opens_base=True),
    "model.load_adapter": Target(_native_adapter, is_ours=False),
    "moelora inspect": Target(_inspect, compares=False),
    "moelora export": Target(_export),
    "moelora export --to merged": Target(_merge),
    "moelora eval": Target(_evaluate, compares=False),
}

# By artefact: the files that are mutated, and who reads it how often.
READERS: dict[str, tuple[list[str], dict[str, Target]]] = {
    **{
        f"adapter-{name}": (
            ["adapter_config.json"] * 4 + ["adapter_model.safetensors"] * 2 + ["moelora.json"],
            _ADAPTER,
        )
        for name in ("plain", "rich", "block", "clusters")
    },
    "recipe": (
        ["recipe.yaml"],
        {
            "load_recipe": Target(_recipe, compares=False),
            "moelora plan": Target(_plan, compares=False),
        },
    ),
    "run": (
        ["moelora_eval.json"] * 3 + ["moelora_eval_documents.parquet"],
        {
            "moelora report": Target(_report, compares=False),
            "moelora compare": Target(_compare, compares=False),
            "moelora export --eval-file": Target(_card, compares=False),
        },
    ),
    "clusters": (
        ["clusters.json"] * 2 + ["clusters.safetensors"],
        {"ClusterAssigner.load": Target(_assign)},
    ),
    "allocation": (["allocation.json"], {"MoeLoraConfig": Target(_allocate, compares=False)}),
}
