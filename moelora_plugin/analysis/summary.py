"""What an adapter on disk is, read without its base model."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from safetensors import safe_open

from ..checkpoint import resolve_adapter, verify_config, verify_weights
from ..config import PEFT_TYPE, MoeLoraConfig
from ..errors import AdapterError
from ..manifest import (
    MANIFEST_FILE,
    WEIGHTS_FILE,
    entry,
    not_understood,
    read_adapter_config,
    read_manifest,
)
from ..tables import PlainTable, shown
from .names import natural_order, short_name


@dataclass(frozen=True)
class AdapterSummary:
    """An adapter's shape and history.

    Attributes:
        path: its folder.
        config: its configuration.
        modules: adapted modules by the last part of their name, and how often each occurs.
        total_ranks: rows of each module's stacked A, where its experts have one.
        expert_parameters: entries of all A and B.
        router_parameters: entries of all routers.
        dtypes: dtypes of the stored tensors.
        sha256: digest of the weights.
        manifest: how it was trained, empty where PEFT alone saved it.
    """

    path: Path
    config: MoeLoraConfig
    modules: dict[str, int]
    total_ranks: tuple[int, ...]
    expert_parameters: int
    router_parameters: int
    dtypes: tuple[str, ...]
    sha256: str
    manifest: dict[str, Any]

    def table(self) -> Group:
        """For the terminal: the adapter, and its expert load where training logged it."""
        config = self.config
        rows = {
            "adapter": str(self.path),
            "base": str(config.base_model_name_or_path),
            "experts": self._experts(),
            "scale": f"alpha {config.lora_alpha:g}" + (", rsLoRA" if config.use_rslora else ""),
            "router": f"{config.router}, {config.router_score} scores, by {config.router_input}, "
            f"per {config.site}",
            "gate rescale": f"{config.gate_rescale} (scope {config.gate_rescale_scope})",
            "modules": ", ".join(f"{name} x {count}" for name, count in self.modules.items()),
            "parameters": f"{self.expert_parameters:,} in experts, "
            f"{self.router_parameters:,} in routers",
            "stored as": ", ".join(self.dtypes),
            "weights sha256": self.sha256,
        }
        if training := self._training():
            rows["trained"] = training
        if strange := not_understood(self.manifest):
            rows["not understood"] = f"{MANIFEST_FILE}: {'; '.join(strange)}"
        head = PlainTable(show_header=False, box=None, pad_edge=False)
        for name, value in rows.items():
            head.add_row(shown(name, "bold"), value)
        return Group(head, *self._load_table())

    def _experts(self) -> str:
        """Kind, number and ranks."""
        config = self.config
        kind = "" if config.expert == "lora" else f"{config.expert}, "
        if config.allocation != "uniform":
            ranks = self.total_ranks or (0,)
            span = str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"
            return f"{kind}by allocation {config.allocation!r} (total rank {span} per module)"
        rank = config.r / config.num_experts if config.total_rank else config.r
        return (
            f"{kind}{config.num_experts}, top {config.top_k}, rank {rank:g} each "
            f"(total rank {rank * config.num_experts:g})"
        )

    def _training(self) -> str:
        """One line of what the manifest says about the run; empty where it says nothing."""
        tasks = entry(self.manifest, "recipe", "data", "tasks")
        optimizer = entry(self.manifest, "recipe", "optimizer", "name")
        steps, loss = entry(self.manifest, "steps"), entry(self.manifest, "train_loss")
        run = [
            *([] if tasks is None else [f"on {', '.join(tasks)}"]),
            *([] if optimizer is None else [f"with {optimizer}"]),
        ]
        facts = [
            *([" ".join(run)] if run else []),
            *([] if steps is None else [f"{steps} steps"]),
            *([] if loss is None else [f"final mean loss {loss:.4f}"]),
        ]
        return ", ".join(facts)

    def _load_table(self) -> list[PlainTable]:
        routing = entry(self.manifest, "routing") or {}
        if not routing:
            return []
        table = PlainTable(title="Expert load (share of selections)", title_justify="left")
        table.add_column("layer", overflow="fold")
        for column in ("least", "most", "unused", "entropy / log E"):
            table.add_column(column, justify="right")
        for name in sorted(routing, key=natural_order):
            layer, load = routing[name], routing[name]["load"]
            uniform = math.log(len(load)) if len(load) > 1 else 1.0
            table.add_row(
                short_name(name),
                f"{min(load):.3f}",
                f"{max(load):.3f}",
                str(sum(share == 0 for share in load)),
                f"{layer['entropy'] / uniform:.3f}",
            )
        return [table]


def inspect_adapter(path: Path | str) -> AdapterSummary:
    """Read an adapter's files and check them.

    Raises:
        AdapterError: damaged, or not a MoE-LoRA adapter.
        MissingDependencyError: not a folder, and the hub cannot be reached.
    """
    folder = resolve_adapter(path)
    content = read_adapter_config(folder)
    if content.get("peft_type") != PEFT_TYPE:
        raise AdapterError(
            f"{folder} is a {content.get('peft_type')} adapter; `moelora inspect` reads "
            f"{PEFT_TYPE} only."
        )
    digest = verify_weights(folder)
    verify_config(folder)
    adapted: set[str] = set()
    total_ranks = []
    experts = routers = 0
    dtypes = set()
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        for key in sorted(file.keys()):
            tensor = file.get_slice(key)
            dtypes.add(str(tensor.get_dtype()))
            size = math.prod(tensor.get_shape())
            module, found, parameter = key.partition(".moelora_")
            if not found:
                continue
            if parameter.startswith(("gate", "router", "modifiers")):
                routers += size
            else:
                experts += size
                adapted.add(module)
                if parameter == "A.weight":
                    total_ranks.append(tensor.get_shape()[0])
    return AdapterSummary(
        path=folder,
        config=MoeLoraConfig.from_pretrained(str(folder)),
        modules=dict(Counter(name.rpartition(".")[2] for name in sorted(adapted))),
        total_ranks=tuple(total_ranks),
        expert_parameters=experts,
        router_parameters=routers,
        dtypes=tuple(sorted(dtypes)),
        sha256=digest,
        manifest=read_manifest(folder),
    )
