"""Routing over LoRA adapters that exist already, which stay as they are."""

from __future__ import annotations

from typing import Any

from .base import Preset

_NEEDS = {
    "init_kwargs.paths": "the folders or hub ids of the trained LoRA adapters, a list",
    "num_experts": "how many adapters there are",
    "r": "the largest rank of the adapters",
}
# The adapters stay as they are; what trains is the router.
_FROZEN: dict[str, Any] = {
    "top_k": 1,  # dense routers do not read it
    "lora_dropout": 0.0,
    "expert": "lora",
    "expert_kwargs": {"frozen": True},
    "init": "adapters",
}

PRETRAINED: dict[str, Preset] = {
    "xlora": Preset(
        "A first pass without adapters decides for each token how the second mixes them.",
        "Buehler and Buehler 2024, arXiv 2402.07148",
        {
            **_FROZEN,
            "site": "model",
            "router": "softmax",
            "router_score": "linear",
            "router_score_kwargs": {"bias": True},
        },
        title="X-LoRA: Mixture of Low-Rank Adapter Experts",
        numbers="PEFT's defaults: depth 1, one decision for all modules; PEFT's xlora is by layer "
        "with site_kwargs.layerwise",
        needs=_NEEDS,
        verified=("equal to PEFT's X-LoRA on the same weights", "slow oracle"),
        usage="generate with use_cache=False: every new token needs the first pass over all",
    ),
    "arrow": Preset(
        "Adapters are scored by their main direction, three are mixed; nothing trains.",
        "Ostapenko et al. 2024, arXiv 2405.11157",
        {**_FROZEN, "top_k": 3, "router": "topk", "router_score": "prototype"},
        title="Towards Modular LLMs by Building and Reusing a Library of LoRAs",
        numbers="PEFT's defaults: three adapters, temperature 1",
        needs=_NEEDS,
        omits=("Building the library; bring trained adapters.",),
        verified=("equal to PEFT's Arrow on the same adapters", "slow oracle"),
    ),
    "genknowsub": Preset(
        "Arrow over adapters from which the mean of general ones is taken away.",
        "Bagherifard et al. 2025, arXiv 2505.10939",
        {**_FROZEN, "top_k": 3, "router": "topk", "router_score": "prototype"},
        title="GenKnowSub: Improving Modularity and Reusability of LLMs through Subtraction",
        numbers="PEFT's defaults",
        needs={**_NEEDS, "init_kwargs.subtract": "the general adapters, a list"},
        verified=("equal to PEFT's Arrow with general knowledge subtraction",),
    ),
    "mole_wu": Preset(
        "A gate in each module over frozen adapters, softened by a temperature.",
        "Wu et al. 2024, arXiv 2404.13628",
        {
            **_FROZEN,
            "router": "softmax",
            "router_modifiers": {"temperature": 1.0},
            "aux_losses": {"importance_cv2": 0.01},
        },
        title="Mixture of LoRA Experts",
        numbers="ours: no code is public, the paper's own could not be read",
        needs=_NEEDS,
        omits=(
            "The paper's gate reads the experts' outputs; this one reads the module's input.",
            "Its temperature trains; here it is a number.",
            "Its balance loss is another form than importance_cv2.",
        ),
    ),
    "cat": Preset(
        "Frozen adapters with a learned weight in each module.",
        "Prabhakar et al. 2024, arXiv 2410.13025",
        {
            **_FROZEN,
            "router": "relu",
            "router_input": "none",
            "router_score": "static",
            "router_score_kwargs": {"value": 1.0},
        },
        title="LoRA Soups: Merging LoRAs for Practical Skill Composition Tasks",
        numbers="weights of 1 at first: ours",
        merge="exact",
        needs=_NEEDS,
        omits=("A weight that falls below zero stays at zero.",),
        verified=("equal to PEFT's concatenation of the adapters at the same weights",),
    ),
    "self_moe": Preset(
        "Self-specialised adapters behind one small linear router, one selected.",
        "Kang et al. 2024, arXiv 2406.12034",
        {**_FROZEN, "router": "topk", "router_kwargs": {"renormalize": False}},
        title="Self-MoE: Towards Compositional LLMs with Self-Specialized Experts",
        numbers="ours: the paper's own could not be read",
        needs=_NEEDS,
        omits=("Making the data and training the adapters; bring them.",),
    ),
    "omni_smola": Preset(
        "Many small experts under a soft mixture, on a base that is tuned already.",
        "Wu et al. 2023, arXiv 2312.00968",
        {"num_experts": 16, "top_k": 16, "r": 4, "lora_alpha": 4, "router": "softmax"},
        title="Omni-SMoLA: Boosting Generalist Multimodal Models with Soft MoE of Experts",
        numbers="ours: the paper's own could not be read",
        omits=(
            "Soft MoE's slots, which mix tokens before the experts: a language model that "
            "generates cannot look ahead, so each token has its own mixture here.",
            "Experts of one modality: the mixture does not know which tokens are an image's.",
        ),
    ),
}
