"""Named adapter configurations: overrides over `MoeLoraConfig`'s defaults, with their source.

Adding one is one entry. An explicit value passed beside the preset wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_PAPER = "arXiv 2502.15828"


@dataclass(frozen=True)
class Preset:
    """One method.

    Attributes:
        summary: one line for `moelora presets`.
        source: where the formula and the numbers come from.
        overrides: fields of MoeLoraConfig.
    """

    summary: str
    source: str
    overrides: Mapping[str, Any]


# The paper's default mixture (Table 12): 20 experts, 10 selected, rank 4 each.
_MIXTURE: dict[str, Any] = {
    "num_experts": 20,
    "top_k": 10,
    "r": 4,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "router": "topk",
    "expert": "lora",
}

PRESETS: dict[str, Preset] = {
    "moe_lora": Preset(
        "Plain mixture of LoRA experts, 20/10/4; the optimizer decides the gate rescaling.",
        f"{_PAPER}, eq. 8, Table 12",
        _MIXTURE,
    ),
    "r_moe_lora": Preset(
        "20/10/4 with ordinary gradients, for rsgd and radamw (RSGD, RAdamW).",
        f"{_PAPER}, eq. 6, Table 12",
        {**_MIXTURE, "gate_rescale": "none"},
    ),
    "gr_moe_lora": Preset(
        "20/10/4 with the square-root gate rescaling, for grsgd and gradamw (gRSGD, gRAdamW).",
        f"{_PAPER}, eq. 13, Table 12",
        {**_MIXTURE, "gate_rescale": "sqrt"},
    ),
    "gr_exact": Preset(
        "20/10/4 with exponent 0: the per-token update of eq. 11/12 that sqrt only approximates.",
        f"{_PAPER}, eq. 11 and 12; realised here by the backward of the layer",
        {**_MIXTURE, "gate_rescale": "exact"},
    ),
    "single_lora": Preset(
        "One expert of rank 80 with gate 1: plain LoRA of the same total rank, to compare with; "
        "merges exactly.",
        "Hu et al., arXiv 2106.09685",
        {"num_experts": 1, "top_k": 1, "r": 80, "lora_alpha": 320, "lora_dropout": 0.05},
    ),
}
