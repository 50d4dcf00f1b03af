"""What is measured: adapted layers and models, ours and PEFT's LoRA of the same total rank."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from timing import Settings
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from moelora_plugin import MoeLoraConfig
from moelora_plugin.base_model import load_base_model
from moelora_plugin.demo.sources import base_model, hub_reachable

EXPERTS, TOP_K, RANK = 20, 10, 4
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
WIDTH = 2048

# PEFT still asks a model of transformers 5 by the old name.
warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
logging.disable_progress_bar()  # of loading weights


class Base(nn.Module):
    """A frozen linear, as in the middle of a model."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Map through the frozen weight."""
        return self.linear(x)


def mixture(targets: list[str] | str, **values: Any) -> MoeLoraConfig:
    """Our adapter, 20/10/4 and without dropout unless told otherwise."""
    defaults = {"r": RANK, "num_experts": EXPERTS, "top_k": TOP_K, "lora_dropout": 0.0}
    return MoeLoraConfig(target_modules=targets, **(defaults | values))


def lora(targets: list[str] | str, rank: int = EXPERTS * RANK, **values: Any) -> LoraConfig:
    """PEFT's LoRA, the limit."""
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, **values)


def adapted(base: nn.Module, config: Any, settings: Settings) -> nn.Module:
    """A copy of `base` with an adapter whose B is not zero, so that all gradients are ordinary."""
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), config).to(settings.device)
    for name, parameter in model.named_parameters():
        if "_B." in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def layer_input(tokens: int, settings: Settings, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """An input that needs its gradient, and the gradient of the output."""
    torch.manual_seed(1)
    shape = (4, tokens // 4, width)
    x, upstream = (
        torch.randn(shape, device=settings.device, dtype=settings.dtype) for _ in range(2)
    )
    return x.requires_grad_(), upstream


def forward_backward(
    layer: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor, settings: Settings
) -> Callable[[], None]:
    """One pass through a layer and back, after which the gradients are let go."""
    trained = [x, *layer.parameters()] if isinstance(layer, nn.Module) else [x]

    def call() -> None:
        with settings.autocast():
            y = layer(x)
        y.backward(upstream.to(y.dtype))
        for tensor in trained:
            tensor.grad = None

    return call


@functools.cache
def smollm2() -> str:
    """SmolLM2-135M-Instruct: its hub id, or a folder with the copy that the demo makes."""
    return base_model(hub_reachable())


def load_smollm2(settings: Settings) -> PreTrainedModel:
    """The model, in the settings' dtype."""
    dtype = str(settings.dtype).removeprefix("torch.")
    return load_base_model(smollm2(), dtype=dtype, device=settings.device)
