"""Write the generated parts of docs/methods.md from the code.

    python docs/generate_methods.py

What stands between `<!-- generated: NAME -->` and `<!-- end -->` is replaced; the rest is written
by hand. `tests/methods/test_presets.py` fails where the committed file is not what this writes.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from moelora_plugin import MoeLoraConfig
from moelora_plugin.allocation import ALLOCATIONS
from moelora_plugin.experts import EXPERTS
from moelora_plugin.initialization import INITIALIZATIONS
from moelora_plugin.layers.sites import SITES
from moelora_plugin.losses import LOSSES
from moelora_plugin.ops import reference
from moelora_plugin.presets import PRESETS, Preset
from moelora_plugin.routers import ROUTERS
from moelora_plugin.routers.inputs import INPUTS
from moelora_plugin.routers.modifiers import MODIFIERS
from moelora_plugin.routers.scores import SCORES
from moelora_plugin.scaling import SCALES

FILE = Path(__file__).parent / "methods.md"
# Shapes only: nothing is downloaded, and nothing has memory.
BASES = {
    "SmolLM2-135M": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "Llama-3.2-3B": LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
}
# What stands in for the user's own: adapters (of rank 8) and tasks.
ADAPTERS, TASKS = 4, 8
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
AXES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "Sites": ("site", SITES),
    "Experts": ("expert", EXPERTS),
    "Router inputs": ("router_input", INPUTS),
    "Router scores": ("router_score", SCORES),
    "Routers": ("router", ROUTERS),
    "Router modifiers": ("router_modifiers", MODIFIERS),
    "Allocations": ("allocation", ALLOCATIONS),
    "Auxiliary losses": ("aux_losses", LOSSES),
    "Initialisations": ("init", INITIALIZATIONS),
    "Scales": ("scale", SCALES),
}
# The independent slow implementation that each value is held to, in `moelora_plugin.ops.reference`.
ORACLES: dict[str, dict[str, str]] = {
    "site": {
        "block": "block_loop",
        "layer": "gated_linear_loop",
        "model": "xlora_scalings_loop",
    },
    "expert": {
        **dict.fromkeys(("lora", "rank", "frozen_sparse_a"), "lora_terms"),
        "shared_a": "shared_a_terms",
        "shared_b": "shared_b_terms",
        "block_diagonal": "block_diagonal_terms",
        "vector": "vector_terms",
        "tree": "tree_loop",
        "dora": "dora_terms",
        "mixed_factors": "mixed_factor_terms",
        "pools": "pool_terms",
        "tensor": "tensor_terms",
    },
    "router": {
        "topk": "topk_softmax_loop",
        "softmax": "softmax_loop",
        "top_p": "top_p_loop",
        "threshold": "threshold_loop",
        "sparsegen": "sparsegen_loop",
        "sigmoid": "sigmoid_loop",
        "relu": "relu_loop",
        "hard": "hard_loop",
        "noisy_topk": "noisy_topk_loop",
        "expert_choice": "expert_choice_loop",
        "sinkhorn": "sinkhorn_loop",
    },
    "router_score": {
        "mlp": "mlp_score_loop",
        "cosine": "cosine_score_loop",
        "prototype": "prototype_score_loop",
        "embedding": "embedding_score_loop",
        "self_norm": "self_norm_score_loop",
        "self_rank": "self_rank_score_loop",
        "multi": "multi_score_loop",
        "recurrent": "recurrent_score_loop",
    },
    "router_input": {"sequence": "pool_loop", "prompt": "pool_loop"},
    "init": dict.fromkeys(("pissa", "milora", "segments"), "svd_updates_loop"),
    "aux_losses": {
        "switch_lb": "switch_lb_loop",
        "z": "z_loop",
        "importance_cv2": "column_sums_cv_squared_loop",
        "load_cv2": "column_sums_cv_squared_loop",
        "localized_cv2": "localized_cv2_loop",
        "entropy": "entropy_loop",
        "rsl": "rsl_loop",
        "lambda_sparsity": "lambda_sparsity_loop",
        "contrastive": "contrastive_loop",
        "orthogonal": "orthogonal_loop",
    },
}


def generated(text: str) -> str:
    """`text` with its generated parts written anew."""

    def write(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{PARTS[match[2]]().strip()}\n\n{match[3]}"

    return re.sub(r"(<!-- generated: (\w+) -->).*?(<!-- end -->)", write, text, flags=re.DOTALL)


def preset_table() -> str:
    """One row per preset."""
    columns = [
        "preset",
        "source",
        "site, experts",
        "input → score → router",
        "auxiliary losses",
        "init, scale",
        "p",
        *(f"trainable, {base}" for base in BASES),
        "merges",
        "verified",
    ]
    rows = [
        [
            f"`{name}`",
            preset.source,
            _experts(_fields(preset)),
            _routing(_fields(preset)),
            _losses(_fields(preset)),
            _initialisation(_fields(preset)),
            {"none": "1", "sqrt": "1/2", "exact": "0"}.get(_fields(preset)["gate_rescale"], "any"),
            *(_short(trainable_parameters(name, base)) for base in BASES),
            preset.merge,
            "; ".join([*preset.verified, f"by loops: {', '.join(_oracles(_fields(preset)))}"]),
        ]
        for name, preset in PRESETS.items()
    ]
    return _table(columns, rows)


def trainable_parameters(name: str, base: str) -> int:
    """What trains of a preset on a base; on attention where the preset names no targets."""
    preset, shape = PRESETS[name], BASES[base]
    layers = shape.num_hidden_layers
    if _fields(preset)["allocation"] == "uniform" and _fields(preset)["site"] != "model":
        return layers * _count(name, _with_layers(shape, 1))  # all layers are the same
    return _count(name, shape)


def _count(name: str, shape: LlamaConfig) -> int:
    targets = PRESETS[name].overrides.get("target_modules", ATTENTION)
    with init_empty_weights():
        model = LlamaForCausalLM(shape)
    # For inference, so that nothing reads the base's weights or an adapter's files.
    config = MoeLoraConfig.from_preset(
        name, **{"target_modules": targets, "inference_mode": True, **needed(name, model)}
    )
    adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    return sum(p.numel() for n, p in adapted.named_parameters() if "moelora_" in n)


def _with_layers(shape: LlamaConfig, layers: int) -> LlamaConfig:
    return LlamaConfig(**{**shape.to_dict(), "num_hidden_layers": layers})


def needed(name: str, model: nn.Module) -> dict[str, Any]:
    """Values for what only the user can give."""
    linears = (n for n, m in model.named_modules() if isinstance(m, nn.Linear))
    values: dict[str, dict[str, Any]] = {
        "init_kwargs.paths": {"init_kwargs": {"paths": ["a"] * ADAPTERS}},
        "init_kwargs.subtract": {"init_kwargs": {"paths": ["a"] * ADAPTERS, "subtract": ["b"]}},
        "num_experts": {"num_experts": ADAPTERS},
        "r": {"r": 8},
        "target_modules": {"target_modules": ATTENTION},
        "router_score_kwargs.num_ids": {"router_score_kwargs": {"num_ids": TASKS}},
        "allocation_kwargs": {
            "allocation_kwargs": {"modules": {name: {"num_experts": 5} for name in linears}}
        },
    }
    given: dict[str, Any] = {}
    for key in PRESETS[name].needs:
        given |= values[key]
    return given


def axes() -> str:
    """The values of each axis: name, and the first line of its docstring."""
    parts = []
    for title, (key, entries) in AXES.items():
        rows = [
            [f"`{name}`", _first_line(entry), _options(entry)] for name, entry in entries.items()
        ]
        parts.append(
            f"### {title} (`{key}`)\n\n" + _table(["value", "what it is", "options"], rows)
        )
    return "\n\n".join(parts)


def differences() -> str:
    """What each preset leaves out, where its numbers come from, what its calls must bring."""
    lines = []
    for name, preset in PRESETS.items():
        notes = [f"Numbers: {preset.numbers}." if preset.numbers else "", *preset.omits]
        if preset.optimizer:
            notes.append(f"Optimizer: {preset.optimizer}.")
        lines.append(f"- `{name}` (*{preset.title}*). {' '.join(filter(None, notes))}")
    return "\n".join(lines)


PARTS: dict[str, Callable[[], str]] = {
    "presets": preset_table,
    "axes": axes,
    "differences": differences,
}


@cache
def _defaults() -> dict[str, Any]:
    return vars(MoeLoraConfig())


def _fields(preset: Preset) -> dict[str, Any]:
    return {**_defaults(), **preset.overrides}


def _experts(fields: Mapping[str, Any]) -> str:
    kind = fields["expert"]
    rank = f"total rank {fields['r']}" if fields["total_rank"] else f"r {fields['r']}"
    text = f"{fields['site']}: {kind} {fields['num_experts']}/{fields['top_k']}, {rank}"
    if fields["allocation"] != "uniform":
        text += f", {_call(fields, 'allocation')}"
    if fields["universal_expert"] != "none":
        text += f", universal ({fields['universal_expert']})"
    return text


def _routing(fields: Mapping[str, Any]) -> str:
    steps = [_call(fields, key) for key in ("router_input", "router_score", "router")]
    modifiers = [f"{name} {_value(value)}" for name, value in fields["router_modifiers"].items()]
    return " → ".join(steps) + "".join(f", {modifier}" for modifier in modifiers)


def _losses(fields: Mapping[str, Any]) -> str:
    return (
        ", ".join(f"{name} {_value(value)}" for name, value in fields["aux_losses"].items())
        or "none"
    )


def _initialisation(fields: Mapping[str, Any]) -> str:
    scale = "rsLoRA" if fields["use_rslora"] else fields["scale"]
    return f"{_call(fields, 'init')}, {scale} {fields['lora_alpha']:g}"


def _oracles(fields: Mapping[str, Any]) -> list[str]:
    """The slow implementations that the preset's parts are compared with."""
    names = {}
    for key, by_value in ORACLES.items():
        values = fields[key] if isinstance(fields[key], Mapping) else [fields[key]]
        names.update({by_value[value]: None for value in values if value in by_value})
    return [f"`{name}`" for name in names if getattr(reference, name)]


def _call(fields: Mapping[str, Any], key: str) -> str:
    """A part with the options that the preset gives it."""
    options = fields[f"{key}_kwargs"]
    inside = ", ".join(f"{name} {_value(value)}" for name, value in options.items())
    return f"{fields[key]} ({inside})" if inside else str(fields[key])


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return "-".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _first_line(entry: Any) -> str:
    text = inspect.getdoc(entry) or ""
    first = text.split("\n\n")[0]
    return " ".join(first.split())


def _options(entry: Any) -> str:
    kinds = inspect.signature(entry).parameters.values()
    names = [p.name for p in kinds if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return ", ".join(f"`{name}`" for name in names)


def _short(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    """Rewrite the file."""
    FILE.write_text(generated(FILE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    # PEFT calls a method that transformers has renamed.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    main()
