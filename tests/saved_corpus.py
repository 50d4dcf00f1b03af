"""Adapters as a release saved them, with what they answered: a zip that later releases are held to.

    PYTHONPATH=tests python tests/saved_corpus.py tests/regression/0.1.zip

Run it once for a release, never to mend a test: what a user has saved cannot be made anew. A corpus
holds for every case the adapter's folder and, in `answers.safetensors`, its logits; and the base
in `base.safetensors`. All in fp64, where only the order of additions is left to differ.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from preset_cases import ATTENTION, adapted, base, ids_of, toy_batch
from safetensors.torch import save_file
from torch import Tensor, nn

from moelora_plugin import PRESETS, MoeLoraConfig
from moelora_plugin.checkpoint import save_adapter

# Beside the presets: keys of PEFT's and of ours that change what is saved.
FURTHER: dict[str, dict[str, Any]] = {
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "token_indices": {"trainable_token_indices": [3, 10]},
    "biases": {"bias": "moelora_only"},
    "all_linear": {"target_modules": "all-linear", "use_rslora": True},
    "shared_router": {"site_kwargs": {"share": [["q_proj", "k_proj", "v_proj"]]}},
    "pattern": {"allocation": "pattern", "allocation_kwargs": {"r": {"q_proj": [1, 2, 3, 4]}}},
    "pissa": {"init": "pissa"},
    "milora": {"init": "milora"},
    "segments": {"init": "segments"},
    "balance_bias": {"router_modifiers": {"balance_bias": {}}},
    "capacity": {"router_modifiers": {"temperature": 0.5, "capacity": 2}},
    "sequence": {"router_input": "sequence"},
    "universal": {"universal_expert": "complement"},
    "gate_rescale": {"gate_rescale": "sqrt", "aux_losses": {"switch_lb": 0.01}},
}


def shaken(model: nn.Module) -> nn.Module:
    """The same in fp64, every tensor that is saved with values of its own: quarters, which pack."""
    model.double()
    torch.manual_seed(7)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        is_saved = any(part in name for part in ("moelora_", "modules_to_save", "token_adapter"))
        if is_saved and "base_layer" not in name and tensor.is_floating_point():
            tensor.data = (4 * tensor.data + 0.6 * torch.randn_like(tensor)).round() / 4
    return model


def models() -> dict[str, Callable[[], PeftModel]]:
    """Every case by name."""

    def preset(name: str) -> Callable[[], PeftModel]:
        return lambda: adapted(name)

    def further(name: str) -> Callable[[], PeftModel]:
        def made() -> PeftModel:
            fields = {
                "r": 2,
                "num_experts": 4,
                "top_k": 2,
                "lora_dropout": 0.0,
                "target_modules": ATTENTION,
                **FURTHER[name],
            }
            model = base()
            torch.manual_seed(0)
            return get_peft_model(model, MoeLoraConfig(**fields))

        return made

    return {
        **{f"preset-{name}": preset(name) for name in sorted(PRESETS)},
        **{f"config-{name}": further(name) for name in FURTHER},
    }


def ids_for(case: str) -> dict[str, Tensor]:
    """The task or cluster ids that a case's calls bring along."""
    kind, _, name = case.partition("-")
    return ids_of(name) if kind == "preset" else {}


def answer(case: str, model: nn.Module) -> Tensor:
    """The logits of the toy batch without its answers, padding on the left of half of its rows."""
    input_ids = toy_batch()["input_ids"]
    mask = torch.ones_like(input_ids)
    mask[::2, 0] = 0
    with torch.no_grad():
        call = {"input_ids": input_ids, "attention_mask": mask, "use_cache": False}
        return model.eval()(**call, **ids_for(case)).logits


def write(out: Path) -> None:
    """Save every case of this version."""
    answers: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for case, make in models().items():
            model = shaken(make())
            save_adapter(model, folder / case)
            answers[case] = answer(case, model)
        save_file(answers, folder / "answers.safetensors")
        tensors = base().double().state_dict()
        save_file({key: t.clone() for key, t in tensors.items()}, folder / "base.safetensors")
        with zipfile.ZipFile(out, "w", zipfile.ZIP_LZMA) as archive:
            for file in sorted(folder.rglob("*")):
                if file.is_file() and file.name != "README.md":
                    archive.write(file, file.relative_to(folder))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
