"""The paper's own mixtures, and the plain LoRA they are compared with."""

from __future__ import annotations

from typing import Any

from .base import Preset

_TITLE = "A Stronger Mixture of Low-Rank Experts for Fine-Tuning Foundation Models"
_SOURCE = "Sun et al. 2025, arXiv 2502.15828"
# Table 12: 20 experts, 10 selected, rank 4 each.
_NUMBERS = "20/10/4, alpha 16, dropout 0.05: Table 12"
_MIXTURE: dict[str, Any] = {
    "num_experts": 20,
    "top_k": 10,
    "r": 4,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "router": "topk",
    "expert": "lora",
}
_GOLDEN = "golden numbers of the authors' code (forward, gradients, steps)"
_RATES = "Table 12: AdamW 1e-5 or SGD 3e-5; gates 3e-8, their gradient clipped at 1"

PAPER: dict[str, Preset] = {
    "moe_lora": Preset(
        "Plain mixture of LoRA experts, 20/10/4; the optimizer decides the gate rescaling.",
        _SOURCE,
        _MIXTURE,
        title=_TITLE,
        numbers=_NUMBERS,
        verified=(_GOLDEN,),
        optimizer=_RATES,
    ),
    "r_moe_lora": Preset(
        "20/10/4 with ordinary gradients, for rsgd and radamw (RSGD, RAdamW; eq. 6).",
        _SOURCE,
        {**_MIXTURE, "gate_rescale": "none"},
        title=_TITLE,
        numbers=_NUMBERS,
        verified=(_GOLDEN,),
        optimizer=_RATES,
    ),
    "gr_moe_lora": Preset(
        "20/10/4 with square-root gate rescaling, for grsgd and gradamw (gRSGD; eq. 13).",
        _SOURCE,
        {**_MIXTURE, "gate_rescale": "sqrt"},
        title=_TITLE,
        numbers=_NUMBERS,
        omits=("The square root gives g^1.5, not the g of eq. 12; gr_exact gives g.",),
        verified=(_GOLDEN,),
        optimizer=_RATES,
    ),
    "gr_exact": Preset(
        "20/10/4 with exponent 0: the update of eq. 11/12 that sqrt only approximates.",
        _SOURCE,
        {**_MIXTURE, "gate_rescale": "exact"},
        title=_TITLE,
        numbers=f"{_NUMBERS}; the exponent is ours",
        omits=("The paper calls eq. 11/12 unrealisable; here the layer's backward realises it.",),
        verified=("fitted projection coefficients of one step equal the gates",),
        optimizer=_RATES,
    ),
    "single_lora": Preset(
        "One expert of rank 80 with gate 1: plain LoRA of the same total rank.",
        "Hu et al. 2021, arXiv 2106.09685",
        {"num_experts": 1, "top_k": 1, "r": 80, "lora_alpha": 320, "lora_dropout": 0.05},
        title="LoRA: Low-Rank Adaptation of Large Language Models",
        numbers="the total rank and the scale of moe_lora; ours, to compare with",
        merge="exact",
        verified=("equal to PEFT's LoRA bit for bit",),
    ),
}
