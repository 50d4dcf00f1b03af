"""The smallest configuration of an architecture: its default one with every size cut down.

Sizes are found by what their names say in every architecture of transformers. What does not go by
that stands in `EXCEPTIONS`, by model type.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, PretrainedConfig

VOCABULARY = 128
# Ordinary tokens end here: ids that stand for images and the like come after, each its own.
TEXT_TOKENS = 96

# The first pattern that an attribute's whole name matches decides; None leaves it alone.
SIZES: list[tuple[str, int | None]] = [
    (r"(.*_)?vocab_size(_.*)?|.*_vocab|n_words", VOCABULARY),
    (r".*(num|n)_(hidden_)?(layers|layer|blocks|block)|.*layers|depth|num_.*_layers", 2),
    (r".*(key_value|kv)_heads?|.*num_(kv|key_value)_.*heads|n_head_kv|num_kv_heads", 2),
    (r".*(_heads?|n_heads?|attention_heads)|heads?", 4),
    (r".*head_dim|.*_head_size|head_size|d_kv", 8),
    (r".*(intermediate|ffn|ff|mlp)_(size|dim|hidden_size)|d_ff|n_inner|.*ffn_hidden_size", 32),
    (
        r".*(hidden|embed|embedding|model|encoder|decoder)_(size|dim)|d_model|n_embd|dim|emb_dim"
        r"|.*hidden_dim",
        32,
    ),
    (r".*(num|n)_.*experts_per_tok(en)?|.*top_?k(_experts)?|.*experts_top_k", 2),
    (r".*(num|n)_(shared|zero)_experts", 1),
    (r".*num_.*experts|n_.*experts|.*experts_num|moe_num_experts", 4),
    (r"image_size|img_size|input_size", 32),
    (r"patch_size", 8),
    (r"rotary_dim", 4),
    (r"moe_k|top_k_.*|.*_topk", 2),
    (r"mamba_n_heads|mamba_num_heads", 4),
    (r"mamba_d_state|state_size|ssm_state_size", 8),
    (r"true_hidden_size|intra_bottleneck_size", 32),
    (r"n_group|num_expert_groups?", 2),
    (r"topk_groups?", 1),
    (r"mamba_n_groups|mamba_ngroups|n_groups", 1),
    (r".*lora_rank", 8),
    (r"max_position_embeddings|max_seq_len|n_positions", 512),
]


def tiny_config(model_type: str) -> PretrainedConfig:
    """The default configuration of `model_type`, small."""
    config = AutoConfig.for_model(model_type, **ARGUMENTS.get(model_type, {}))
    shrink(config, itertools.count(TEXT_TOKENS + 1), {})
    EXCEPTIONS.get(model_type, lambda config: None)(config)
    return config


def shrink(config: Any, ids: Any, known: dict[int, int]) -> None:
    """Cut the sizes of a configuration and of those in it, in place.

    Args:
        config: the configuration.
        ids: where ids of special tokens come from.
        known: those that were given away, by what they were: parts of a model share them.
    """
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            shrink(value, ids, known)
        elif re.fullmatch(
            r"(?!num_|.*per_token).*token(_id|_index|_idx|_ids)?|.*_(id|ids|index)", name
        ):
            _set(config, name, _token(value, ids, known))
        elif isinstance(value, int) and not isinstance(value, bool):
            for pattern, size in SIZES:
                if re.fullmatch(pattern, name):
                    if size is not None and value > size:
                        _set(config, name, size)
                    break
    _agree(config)


def _agree(config: Any) -> None:
    """Sizes that follow from others."""
    values = vars(config)
    inner = (values.get("mamba_expand") or values.get("expand") or 2) * (
        values.get("hidden_size") or 0
    )
    for heads, width in MAMBA_HEADS:
        if values.get(heads) and values.get(width):
            _set(config, width, inner // values[heads])
    if values.get("kv_lora_rank"):  # latent attention has as many keys as queries
        _set(config, "num_key_value_heads", config.num_attention_heads)
    for name in ("head_dim", "num_key_value_heads"):
        if name in values and values[name] is None and "num_attention_heads" in values:
            heads = config.num_attention_heads
            _set(config, name, config.hidden_size // heads if name == "head_dim" else heads)
    # One layer of each kind, two at least; there may be lists for attention and for the rest.
    kinds = {
        name: list(dict.fromkeys(value))
        for name, value in values.items()
        if re.fullmatch(r"_?(\w+_)?layer_types|layers_block_type", name)
        and isinstance(value, list)
        and value
    }
    if kinds:
        count = max(2, *map(len, kinds.values()))
        _set(config, "num_hidden_layers", count)
        for name, different in kinds.items():
            _set(config, name, different + different[-1:] * (count - len(different)))
    ropes = values.get("rope_parameters") or values.get("rope_scaling")
    if isinstance(ropes, dict) and "mrope_section" in ropes:
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        half = int(width * (ropes.get("partial_rotary_factor") or 1)) // 2
        ropes["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]


def _set(config: Any, name: str, value: Any) -> None:
    with contextlib.suppress(AttributeError):  # computed from others
        setattr(config, name, value)


def _token(value: Any, ids: Any, known: dict[int, int]) -> Any:
    if isinstance(value, list):
        return [_token(one, ids, known) for one in value]
    if not isinstance(value, int) or isinstance(value, bool) or value < TEXT_TOKENS:
        return value
    if value not in known:
        known[value] = next(ids)
    return known[value]


# How many heads state space layers have and how wide one is: together the inner width.
MAMBA_HEADS = [
    ("mamba_n_heads", "mamba_d_head"),
    ("n_mamba_heads", "mamba_headdim"),
    ("mamba_num_heads", "mamba_head_dim"),
]


def _sections(*sizes: int) -> Callable[[Any], None]:
    """What splits rotary positions into time, height and width."""
    return lambda config: config.text_config.rope_parameters.update(mrope_section=list(sizes))


def _with(**values: Any) -> Callable[[Any], None]:
    """What sets values of a configuration."""

    def change(config: Any) -> None:
        for name, value in values.items():
            setattr(config, name, value)

    return change


# What the constructor must be told, because the default cannot be built at any size.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8}},
    **{
        name: {"embed_dim": 24, "depths": [1, 1], "num_heads": [3, 6], "window_size": 4}
        for name in ("swin", "swinv2", "donut-swin")
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
}
# What is set afterwards.
EXCEPTIONS: dict[str, Callable[[Any], None]] = {
    "deepseek_v2": _with(num_experts_per_tok=2),
    "dots1": _with(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1),
    "esm": _with(vocab_size=VOCABULARY, pad_token_id=1, mask_token_id=32),
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "glm4v", "glm46v", "glm_ocr", "glmga"), _sections(2, 1, 1)
    ),
    "glm4v_moe": _sections(1, 1, 0),
    "falcon_h1": _with(mamba_d_ssm=64, mamba_d_head=16),
    "granitemoehybrid": _with(layer_types=["linear_attention", "full_attention"]),
    "llama4": lambda config: _with(
        intermediate_size=128, projector_input_dim=32, projector_output_dim=32, vision_output_dim=32
    )(config.vision_config),
    "longcat_flash": _with(qk_head_dim=16),
    "mamba2": _with(num_heads=4, head_dim=16),
    "musicgen": lambda config: _with(num_codebooks=1)(config.decoder),
    "musicgen_melody": lambda config: _with(num_codebooks=1)(config.decoder),
    "reformer": _with(is_decoder=True, axial_pos_embds_dim=(8, 24), axial_pos_shape=(3, 4)),
    **dict.fromkeys(("swin", "swinv2", "donut-swin"), _with(hidden_size=48)),
    "mobilevitv2": _with(image_size=128),
    "xmod": _with(default_language="en_XX"),
    "zamba": _with(
        attention_hidden_size=64,
        attention_head_dim=16,
        mamba_dt_rank=4,
        num_hidden_layers=4,
        layers_block_type=["linear_attention", "hybrid"] * 2,
    ),
    "zamba2": _with(
        attention_hidden_size=64,
        attention_head_dim=16,
        mamba_headdim=16,
        num_hidden_layers=4,
        hybrid_layer_ids=[1, 3],
        layers_block_type=["linear_attention", "hybrid"] * 2,
    ),
}
