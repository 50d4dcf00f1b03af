"""MoE-PEFT's layers beside PEFT's LoRA; runs in the environment that `moepeft.py` makes.

Reads a JSON object from its first argument (threads, quick, rounds, cases) and prints one with the
seconds of every round by case and candidate. Dropout is off on both sides: MoE-PEFT insists on
some, which its LoRAs skip in eval mode.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from moe_peft.adapters import lora_config_factory, moe_layer_factory
from moe_peft.common import FeedForward, Linear, LLMBatchConfig, LLMModelInput
from moe_peft.models.modeling_llama import LlamaConfig as TheirConfig
from moe_peft.models.modeling_llama import LlamaMLP as TheirMLP
from peft import LoraConfig, get_peft_model
from timing import Settings, interleave
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

NAME = "adapter"
Layer = Callable[[Tensor], Tensor]
PROJECTIONS = ["gate_proj", "up_proj", "down_proj"]


class Holder(nn.Module):
    """A module that PEFT can find its target in."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Through its only module."""
        return next(self.children())(x)


def mola(width: int, experts: int, top_k: int, rank: int) -> tuple[Holder, Layer, list[Tensor]]:
    """A linear, MoE-PEFT's MoLA on it, and what trains."""
    base = Holder(linear=nn.Linear(width, width, bias=False))
    config = lora_config_factory(_config("MOLA", ["q_proj"], experts, top_k, rank))
    config.adapter_name = NAME
    linear = Linear(base.linear, "cpu")
    linear.moes_[NAME] = moe_layer_factory(width, "cpu", config)
    trained = _add_experts([linear], config, experts)
    trained.append(linear.moes_[NAME].gate_.weight)
    return base, lambda x: linear(x, _one_adapter(x)), trained


def mixlora(
    width: int, hidden: int, experts: int, top_k: int, rank: int
) -> tuple[Holder, Layer, list[Tensor]]:
    """A feed-forward block of Llama, MoE-PEFT's MixLoRA on it, and what trains."""
    shape = LlamaConfig(hidden_size=width, intermediate_size=hidden)
    base = Holder(mlp=LlamaMLP(shape))
    config = lora_config_factory(
        _config("MIXLORA", PROJECTIONS, experts, top_k, rank) | {"routing_strategy": "mixlora"}
    )
    config.adapter_name = NAME
    mlp = TheirMLP(
        base.mlp.gate_proj,
        base.mlp.down_proj,
        base.mlp.up_proj,
        TheirConfig(device_="cpu", hidden_act_="silu"),
    )
    block = FeedForward(mlp)
    block.moes_[NAME] = moe_layer_factory(width, "cpu", config)
    if block.moes_[NAME].act_ is None:  # "as the block's own", which its model fills in
        block.moes_[NAME].act_ = mlp.act_
    trained = _add_experts([mlp.w1_, mlp.w2_, mlp.w3_], config, experts)
    trained.append(block.moes_[NAME].gate_.weight)
    return base, lambda x: block(x, _one_adapter(x))[0], trained


def _config(kind: str, targets: list[str], experts: int, top_k: int, rank: int) -> dict[str, Any]:
    return {
        "peft_type": kind,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.05,
        "target_modules": targets,
        "num_experts": experts,
        "top_k": top_k,
    }


def _add_experts(linears: list[Linear], config: Any, experts: int) -> list[Tensor]:
    trained: list[Tensor] = []
    for linear in linears:
        for expert in range(experts):
            linear.init_lora_weight(config.expert_config(expert))
        for lora in linear.loras_.values():
            nn.init.normal_(lora.lora_b_.weight, std=0.02)
            lora.eval()
            trained += [lora.lora_a_.weight, lora.lora_b_.weight]
    return trained


def _one_adapter(x: Tensor) -> LLMModelInput:
    return LLMModelInput(batch_configs_=[LLMBatchConfig(NAME, 0, len(x))])


def plain(base: Holder, targets: list[str], rank: int) -> nn.Module:
    """PEFT's LoRA on a copy of the same base."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    model = get_peft_model(copy.deepcopy(base), config)
    for name, parameter in model.named_parameters():
        if "_B." in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def call(
    layer: Layer, x: Tensor, upstream: Tensor, trained: Iterable[Tensor]
) -> Callable[[], None]:
    """One pass through a layer and back, after which the gradients are let go."""
    tensors = [x, *trained]

    def run() -> None:
        layer(x).backward(upstream)
        for tensor in tensors:
            tensor.grad = None

    return run


def main() -> None:
    """Time both pairs."""
    given = json.loads(sys.argv[1])
    settings = Settings(threads=given["threads"], quick=given["quick"], rounds=given["rounds"])
    torch.manual_seed(0)
    found = {}
    for case in given["cases"]:
        size = case["experts"], case["top_k"], case["rank"]
        if case["kind"] == "MoLA":
            base, theirs, trained = mola(case["width"], *size)
            limit = plain(base, ["linear"], case["experts"] * case["rank"])
        else:
            base, theirs, trained = mixlora(case["width"], case["hidden"], *size)
            limit = plain(base, PROJECTIONS, case["experts"] * case["rank"])
        shape = 4, case["tokens"] // 4, case["width"]
        x, upstream = torch.randn(shape, requires_grad=True), torch.randn(shape)
        times = interleave(
            {
                "base": call(base, x, upstream, ()),
                "theirs": call(theirs, x, upstream, trained),
                "lora": call(limit, x, upstream, limit.parameters()),
            },
            settings,
        )
        found[case["name"]] = {name: list(values) for name, values in times.seconds.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
