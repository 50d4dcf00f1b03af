"""Every rank is an expert, and experts that score themselves."""

from __future__ import annotations

from .base import Preset

RANKS: dict[str, Preset] = {
    "smora": Preset(
        "Every rank is an expert; a bias that no gradient moves balances them.",
        "Zhao et al. 2025, arXiv 2501.15103",
        {
            "num_experts": 64,
            "top_k": 8,
            "r": 64,
            "lora_alpha": 64,
            "total_rank": True,
            "expert": "rank",
            "router_modifiers": {"balance_bias": 0.001},
        },
        title="Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA",
        numbers="ours: 8 of 64 ranks; the paper's own could not be read",
        omits=("The paper's rule for the bias's step; here it moves by 1e-3 times the sign.",),
    ),
    "flylora": Preset(
        "A frozen sparse random A is the router: the ranks it excites train their B.",
        "Zou et al. 2025, arXiv 2510.08396",
        {
            "num_experts": 32,
            "top_k": 8,
            "r": 32,
            "lora_alpha": 64,
            "lora_dropout": 0.0,
            "total_rank": True,
            "target_modules": "all-linear",
            "expert": "frozen_sparse_a",
            "router": "topk",
            "router_kwargs": {"by": "magnitude", "weight": "one"},
            "router_score": "self_rank",
            "router_modifiers": {"balance_bias": 0.001},
        },
        title="FlyLoRA: Boosting Task Decoupling via Implicit Rank-Wise Mixture-of-Experts",
        numbers="the authors' script: r 32, k 8, alpha 64, bias step 1e-3, seven targets",
        optimizer="the authors' script: AdamW, 3e-4",
    ),
    "mora_rank": Preset(
        "Ranks score themselves by their own activation.",
        "Lu et al. 2025, arXiv 2506.21035",
        {
            "num_experts": 16,
            "top_k": 8,
            "r": 16,
            "lora_alpha": 16,
            "total_rank": True,
            "expert": "rank",
            "router_score": "self_rank",
            "router_score_kwargs": {"normalize": "rows"},
            "router_modifiers": {"temperature": 0.1},
        },
        title="Little By Little: Continual Learning via Self-Activated Mixture-of-Rank Learning",
        numbers="ours: the paper's own could not be read",
        omits=("Freezing old ranks and adding new ones for each task, and rank pruning.",),
    ),
    "aoe_lora": Preset(
        "Experts score themselves by the norm of A x, without a router.",
        "Lv et al. 2025, arXiv 2501.13074",
        {
            "num_experts": 8,
            "top_k": 2,
            "r": 8,
            "lora_alpha": 16,
            "router_score": "self_norm",
        },
        title="Autonomy-of-Experts Models",
        numbers="ours: the paper pretrains whole experts, here its idea over LoRA",
        omits=("The paper's experts are feed-forward layers in pretraining.",),
    ),
    "smore": Preset(
        "Residual low-rank experts in a tree of layers, routed from the top.",
        "Zeng et al. 2025, arXiv 2504.06426",
        {
            "num_experts": 4,
            "top_k": 2,
            "r": 8,
            "lora_alpha": 16,
            "expert": "tree",
            "expert_kwargs": {"children": 4, "fan_out": 2},
            "aux_losses": {"switch_lb": 0.01},
        },
        title="S'MoRE: Structural Mixture of Residual Experts for LLM Fine-tuning",
        numbers="the authors' code: loss 1e-2, gate width 32; sizes are ours",
        omits=(
            "Biases, and noisy or dense gates below the top.",
            "The balance loss sees the top's routing only.",
        ),
        merge="no",
    ),
}
