"""Experts of a base that are parameters of three dimensions and no linears.

No adapter of ours reaches them; checkpoints have names for their parts, by which people ask.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.pytorch_utils import Conv1D

# Names of checkpoints for halves of a parameter that transformers itself never splits.
_HALVES = {"gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class FusedExperts:
    """A base's experts that are parameters of one module, which no adapter of ours reaches.

    Attributes:
        module: the module's name.
        parameters: by name, the per-expert names that checkpoints have for what it holds.
    """

    module: str
    parameters: Mapping[str, tuple[str, ...]]

    def full_names(self) -> Iterator[str]:
        """Every full name under which somebody may ask for them."""
        for parameter, names in self.parameters.items():
            yield f"{self.module}.{parameter}"
            for name in names:
                yield f"{self.module}.{name}"
                yield f"{self.module}.0.{name}"

    def shown(self) -> str:
        """Their names for a message."""
        return ", ".join(
            f"{parameter} ({', '.join(names)})" if set(names) - {parameter} else parameter
            for parameter, names in self.parameters.items()
        )


def fused_experts(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[FusedExperts]:
    """The modules whose parameters are the matrices of several experts each.

    Known by what they are called in every architecture: the module or its class is one of experts.
    What checkpoints call the parts comes from transformers' own table for loading them.
    """
    halves: dict[str, tuple[str, ...]] = dict(_HALVES)
    if isinstance(model, PreTrainedModel):
        halves.update(_per_expert_names(model))
    found = []
    for name, module in modules.items():
        kind = type(module).__name__
        if isinstance(module, nn.Linear | Conv1D | BaseTunerLayer):
            continue
        if "expert" not in f"{name.rpartition('.')[2]} {kind}".lower():
            continue
        parameters = {
            parameter: halves.get(parameter, ())
            for parameter, value in module.named_parameters(recurse=False)
            if value.ndim > 1 and not parameter.endswith("bias")
        }
        if parameters:
            found.append(FusedExperts(name, parameters))
    return found


def _per_expert_names(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """By a fused parameter's name, what checkpoints call its parts of one expert."""
    found: dict[str, tuple[str, ...]] = {}
    for conversion in get_model_conversion_mapping(model):
        sources = [str(source) for source in conversion.source_patterns]
        if len(conversion.target_patterns) != 1 or not any("expert" in s for s in sources):
            continue
        if not hasattr(conversion, "operations"):  # renamed, not merged
            continue
        names = (_last(re.sub(r"\.weight\$?$", "", source)) for source in sources)
        words = tuple(dict.fromkeys(name for name in names if name.isidentifier()))
        found[_last(str(conversion.target_patterns[0]))] = words
    return found


def _last(name: str) -> str:
    return name.rpartition(".")[2]
