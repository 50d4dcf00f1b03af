"""One router per feed-forward block, whose experts are whole blocks."""

from __future__ import annotations

from typing import Any

from .base import Preset

_TITLE = "MixLoRA: Enhancing LLM Fine-Tuning with LoRA-based Mixture of Experts"
_SOURCE = "Li et al. 2024, arXiv 2404.15159"
_RATE = "the paper: AdamW, 2e-4"
# The feed-forward part is routed, and attention gets one LoRA without a router.
_MIXLORA: dict[str, Any] = {
    "num_experts": 8,
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": "all-linear",
    "site": "block",
}

BLOCKS: dict[str, Preset] = {
    "mixlora": Preset(
        "Eight feed-forward blocks with LoRA, two selected; plain LoRA on attention.",
        _SOURCE,
        {
            **_MIXLORA,
            "top_k": 2,
            "router_score": "linear",
            "router_score_kwargs": {"std": 0.02},
            "aux_losses": {"switch_lb": 0.001},
        },
        title=_TITLE,
        numbers="the paper and its code: 8 experts, k 2, r 16, alpha 32, loss 1e-3",
        merge="no",
        optimizer=_RATE,
    ),
    "mixlora_dynamic": Preset(
        "MixLoRA with top-p: as many experts as cover 0.8 of the probability.",
        _SOURCE,
        {
            **_MIXLORA,
            "top_k": 8,
            "router": "top_p",
            "router_kwargs": {"p": 0.8, "renormalize": False},
            "router_score": "linear",
            "router_score_kwargs": {"std": 0.02},
            "aux_losses": {"switch_lb": 0.001},
        },
        title=_TITLE,
        numbers="MoE-PEFT's code: p 0.8, gates not renormalised",
        merge="no",
        optimizer=_RATE,
    ),
    "mixlora_switch": Preset(
        "MixLoRA with one expert for each token, a capacity and a z-loss.",
        _SOURCE,
        {
            **_MIXLORA,
            "top_k": 1,
            "router": "topk",
            "router_kwargs": {"renormalize": False},
            "router_score": "linear",
            "router_score_kwargs": {"std": 1.0},
            "router_modifiers": {"jitter": 0.01, "capacity": {"tokens": 32}},
            "aux_losses": {"switch_lb": 0.001, "z": 0.001},
        },
        title=_TITLE,
        numbers="MoE-PEFT's code: capacity 32 in a sequence, jitter 0.01, router N(0, 1)",
        merge="no",
        omits=(
            "At inference the code returns the block's input instead of its output; that is a bug "
            "and is not copied.",
        ),
        optimizer=_RATE,
    ),
    "llava_mole": Preset(
        "One of three feed-forward blocks, added without its gate.",
        "Chen et al. 2024, arXiv 2401.16160",
        {
            "num_experts": 3,
            "top_k": 1,
            "r": 32,
            "lora_alpha": 64,
            "lora_dropout": 0.05,
            "target_modules": ["gate_proj", "up_proj", "down_proj"],
            "site": "block",
            "router": "hard",
            "router_score": "linear",
            "router_score_kwargs": {"bias": True},
            "aux_losses": {"switch_lb": 0.01},
        },
        title="LLaVA-MoLE: Sparse Mixture of LoRA Experts for Mitigating Data Conflicts",
        numbers="the released checkpoint: 3 experts, r 32; alpha and the loss's weight are ours",
        merge="no",
        omits=("Training code is not public; the paper's LoRA on attention is left out.",),
    ),
}
