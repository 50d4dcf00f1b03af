"""The smallest configuration of an architecture: its default one with every size cut down.

Sizes are found by what their names say in every architecture of transformers; the few that mean
something else in one of them stand in `EXCEPTIONS`.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from transformers import AutoConfig, PretrainedConfig

VOCABULARY = 128
# Ids that end a sentence or stand for an image are told apart by their values.
FIRST_SPECIAL = 100

# The first pattern that an attribute's whole name matches decides; None leaves it alone.
SIZES: list[tuple[str, int | None]] = [
    (r".*(token_id|token_index|_idx|_index|_id)$", None),
    (r"(.*_)?vocab_size(_.*)?|.*_vocab|vocab_size.*", VOCABULARY),
    (r".*(num|n)_(hidden_)?(layers|layer|blocks|block)|.*layers|depth|n_layers?|num_.*_layers", 2),
    (r".*(key_value|kv)_heads?|.*num_(kv|key_value)_.*heads|n_head_kv|num_kv_heads", 2),
    (r".*(_heads?|n_heads?|attention_heads)|heads?", 4),
    (r".*head_dim|.*_head_size|head_size|d_kv", 8),
    (r".*(intermediate|ffn|ff|mlp)_(size|dim|hidden_size)|d_ff|n_inner|.*ffn_hidden_size", 32),
    (
        r".*(hidden|embed|embedding|model|encoder|decoder)_(size|dim)|d_model|n_embd|dim|.*hidden_dim",
        32,
    ),
    (r".*(num|n)_.*experts_per_tok(en)?|.*top_?k(_experts)?|.*experts_top_k", 2),
    (r".*(num|n)_(shared|zero)_experts", 1),
    (r".*num_.*experts|n_.*experts|.*experts_num|moe_num_experts", 4),
    (r"image_size|img_size|input_size", 32),
    (r"patch_size", 8),
]


def tiny_config(model_type: str) -> PretrainedConfig:
    """The default configuration of `model_type`, small."""
    config = AutoConfig.for_model(model_type)
    shrink(config)
    return config


def shrink(config: Any) -> None:
    """Cut the sizes of a configuration and of those in it, in place."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            shrink(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            for pattern, size in SIZES:
                if re.fullmatch(pattern, name):
                    if size is not None and value > size:
                        setattr(config, name, size)
                    break
