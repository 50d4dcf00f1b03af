"""Every preset, small enough to train in a test: what it needs, and a task that it can learn."""

from __future__ import annotations

import atexit
import functools
import json
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_llama
from torch import Tensor, nn

from moelora_plugin import PRESETS, MoeLoraConfig
from moelora_plugin.call import routing_ids
from moelora_plugin.model import moelora_layers

# Each of eight words has one of four answers. A token that is always the same comes first, so that
# attention has something to attend to.
WORDS = torch.arange(10, 18)
ANSWERS = torch.tensor([30, 31, 32, 33]).repeat(2)
IDS = torch.arange(8) % 2  # the task, or the cluster, of each sequence
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# With these the model's base has two layers, and adapters with the same targets.
SMALLER: dict[str, dict[str, Any]] = {
    "mosld": {"allocation_kwargs": {"num_experts": [2, 8]}},
    "mola": {"allocation_kwargs": {"num_experts": [2, 8]}},
    # Slices of two features are too narrow for this task.
    "melora": {"num_experts": 2, "top_k": 2, "target_modules": "all-linear"},
    "goat": {"r": 8},  # at most the width of a module
    "hilo": {"allocation_kwargs": {"num_experts": [2, 8], "r": [2, 8]}},
}


_RUN = ExitStack()
atexit.register(_RUN.close)


def folder_of_the_run() -> Path:
    """A folder that lives as long as the process."""
    return Path(_RUN.enter_context(tempfile.TemporaryDirectory(prefix="moelora-tests-")))


def base() -> nn.Module:
    """A tiny Llama with a sharper head: the last norm bounds how sure it could be without."""
    model = tiny_llama(vocab_size=64, hidden=16, layers=2)
    model.lm_head.weight.data *= 4
    return model


def needed(name: str) -> dict[str, Any]:
    """Values for what only a user can give."""
    given: dict[str, Any] = {}
    for key in PRESETS[name].needs:
        field, _, option = key.partition(".")
        value = NEEDED[key](name)
        if option:
            given[field] = {**given.get(field, {}), option: value}
        else:
            given[field] = value
    return given


@functools.cache
def adapter(seed: int, *rows: int, noise: float = 0.1) -> str:
    """Folder of a LoRA of rank 4 for the tiny base, which has learned these rows of the task.

    Without rows it is random, of this strength. The folder lives as long as the run.
    """
    model = base()
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    batch = {key: value[list(rows)] for key, value in toy_batch().items()}
    for _ in range(30 if rows else 0):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        if "lora_B" in name and not rows:
            nn.init.normal_(parameter, std=noise)
    folder = str(folder_of_the_run())
    model.save_pretrained(folder)
    return folder


def adapters(name: str) -> list[str]:
    """Three LoRAs between which, or between whose weights, the task decides."""
    if PRESETS[name].merge == "exact":  # one weight for all inputs: one that can do it all
        return [adapter(0, *range(8)), adapter(1, noise=0.3), adapter(2, noise=0.3)]
    return [adapter(0, *range(4)), adapter(1, *range(4, 8)), adapter(2)]


@functools.cache
def allocation() -> str:
    """A file that gives the modules of the tiny base two or three experts of different ranks."""
    folder = folder_of_the_run()
    names = [name for name, module in base().named_modules() if isinstance(module, nn.Linear)]
    entries = {name: {"ranks": [1, 3] if i % 2 else [2, 1, 4]} for i, name in enumerate(names)}
    (folder / "allocation.json").write_text(json.dumps(entries))
    return str(folder / "allocation.json")


# What a preset may need, by the key that it names.
NEEDED: dict[str, Callable[[str], Any]] = {
    "init_kwargs.paths": adapters,
    "init_kwargs.subtract": lambda name: [adapter(2)],
    "num_experts": lambda name: 3,
    "r": lambda name: 4,
    "target_modules": lambda name: ATTENTION,
    "allocation_kwargs": lambda name: {"path": allocation()},
    "router_score_kwargs.num_ids": lambda name: 2,
}


def config_of(name: str, **overrides: Any) -> MoeLoraConfig:
    return MoeLoraConfig.from_preset(name, **{**needed(name), **overrides})


def adapted(name: str, seed: int = 0, **overrides: Any) -> PeftModel:
    """A tiny model with the preset, on attention where the preset names no targets."""
    targets = PRESETS[name].overrides.get("target_modules", ATTENTION)
    fields = {"target_modules": targets, **SMALLER.get(name, {}), **overrides}
    config = config_of(name, **fields)  # may train adapters, which draws random numbers
    model = base()
    torch.manual_seed(seed)
    return get_peft_model(model, config)


def grown(name: str, seed: int = 0, **overrides: Any) -> PeftModel:
    """The same with values in place of the zeros that an update starts from."""
    model = adapted(name, seed, **overrides)
    torch.manual_seed(seed + 1)
    for layer in moelora_layers(model).values():
        for tensor in layer.tensors().values():
            if tensor.requires_grad:
                tensor.data += 0.3 * torch.randn_like(tensor)
    return model


M = TypeVar("M", bound=nn.Module)


def randomized(model: M, adapter: str = "default", seed: int = 5) -> M:
    """Whatever the adapter keeps (frozen tensors and counts too) unlike what a new one has."""
    torch.manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if f".{adapter}." in name and "moelora_" in name:
            if tensor.is_floating_point():
                tensor += 0.3 * torch.randn_like(tensor)
            else:
                tensor += torch.randint(-40, 40, tensor.shape)
    return model


def toy_batch() -> dict[str, Tensor]:
    """Eight sequences: first token, word, answer; only the answer has a label."""
    input_ids = torch.stack([torch.full_like(WORDS, 3), WORDS, ANSWERS], 1)
    labels = input_ids.clone()
    labels[:, :-1] = -100
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
    }


def ids_of(name: str) -> dict[str, Tensor]:
    """The ids that the preset's calls bring along, one for each sequence."""
    usage = PRESETS[name].usage
    return {key: IDS for key in ("task_id", "cluster_id") if f"pass {key}" in usage}


def for_one_id(name: str, model: PeftModel) -> AbstractContextManager[None]:
    """A merge's ids: those of the second task or cluster, where the preset has such."""
    return routing_ids(model, **dict.fromkeys(ids_of(name), 1)) if ids_of(name) else nullcontext()
