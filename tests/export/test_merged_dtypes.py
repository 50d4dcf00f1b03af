"""A merged checkpoint: what nobody adapted is the base's own tensor, in its own dtype."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
)

from moelora_plugin import MoeLoraConfig, save_adapter
from moelora_plugin.errors import ExportError
from moelora_plugin.export import export_adapter
from moelora_plugin.model import moelora_layers

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def deepseek() -> Any:
    config = DeepseekV3Config(
        **SIZES, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config)


def glm() -> Any:
    config = Glm4MoeConfig(
        **SIZES, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=1, head_dim=8,
    )  # fmt: skip
    return Glm4MoeForCausalLM(config)


def ernie() -> Any:
    config = Ernie4_5_MoeConfig(**SIZES, moe_num_experts=4, moe_k=2, moe_layer_start_index=1)
    return Ernie4_5_MoeForCausalLM(config)


def llama_tied() -> Any:
    config = tiny_llama().config
    config.tie_word_embeddings = True
    return type(tiny_llama())(config)


ARCHITECTURES = {
    "deepseek_v3": (deepseek, ["o_proj", "shared_experts.down_proj"]),
    "glm4_moe": (glm, ["q_proj", "o_proj"]),
    "ernie4_5_moe": (ernie, ["q_proj", "o_proj"]),
    "llama tied": (llama_tied, ["q_proj", "down_proj"]),
}


def publish(folder: Path, make: Callable[[], Any], other: Callable[[str], bool]) -> None:
    """A base in bfloat16 whose `other` tensors are float32, with digits that bfloat16 has not."""
    torch.manual_seed(0)
    model = make()
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(1)
    for name, tensor in tensors.items():
        if other(name) or "e_score_correction_bias" in name or "moe_statics" in name:
            tensors[name] = tensor.float() + 0.01 * torch.randn(tensor.shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def adapt(base: Path, out: Path, targets: list[str], **keys: Any) -> tuple[Any, Path]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    config = MoeLoraConfig(r=2, num_experts=1, top_k=1, target_modules=targets, **keys)
    torch.manual_seed(2)
    adapted = get_peft_model(model, config).eval()
    for layer in moelora_layers(adapted).values():
        for _, b in layer.expert_weights():
            b.normal_(std=0.5)
    return adapted, save_adapter(adapted, out, tokenizer=tiny_tokenizer())


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found.update(load_file(file))
    return found


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


NOTHING, NORMS = (lambda name: False), (lambda name: "norm" in name or "lm_head" in name)


@pytest.mark.parametrize("other", [NOTHING, NORMS], ids=["biases", "norms too"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_nobody_adapted_is_bitwise_the_base_s(
    name: str, other: Callable[[str], bool], tmp_path: Path
) -> None:
    make, targets = ARCHITECTURES[name]
    base = tmp_path / "base"
    publish(base, make, other)
    adapted, folder = adapt(base, tmp_path / "adapter", targets)
    export_adapter(folder, tmp_path / "merged", to="merged")
    before, after = tensors_of(base), tensors_of(tmp_path / "merged")
    assert before.keys() == after.keys()
    changed = {key for key in before if not same_bits(before[key], after[key])}
    layers = {
        key.removeprefix("base_model.model.") + ".weight": layer
        for key, layer in moelora_layers(adapted).items()
    }
    assert changed == layers.keys()
    for key, layer in layers.items():  # rounded once, into the dtype of the base's file
        exact = layer.get_base_layer().weight + layer.static_update()
        assert same_bits(after[key], exact.to(before[key].dtype))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_an_adapted_tensor_keeps_its_own_dtype_too(tmp_path: Path) -> None:
    base = tmp_path / "base"
    publish(base, tiny_llama, lambda name: "q_proj" in name)
    adapted, folder = adapt(base, tmp_path / "adapter", ["q_proj"], modules_to_save=["norm"])
    with torch.no_grad():
        adapted.model.model.norm.modules_to_save["default"].weight.mul_(1.7)
    save_adapter(adapted, folder, tokenizer=tiny_tokenizer(), overwrite=True)
    export_adapter(folder, tmp_path / "merged", to="merged")
    before, after = tensors_of(base), tensors_of(tmp_path / "merged")
    assert {key: tensor.dtype for key, tensor in after.items()} == {
        key: tensor.dtype for key, tensor in before.items()
    }
    for key, layer in moelora_layers(adapted).items():
        exact = layer.get_base_layer().weight + layer.static_update()
        assert same_bits(after[key.removeprefix("base_model.model.") + ".weight"], exact)
    assert not same_bits(before["model.norm.weight"], after["model.norm.weight"])


@pytest.mark.parametrize("form", ["shards", "pickle"])
def test_however_the_base_is_stored(form: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    publish(base, glm, NORMS)
    before = tensors_of(base)
    if form == "pickle":
        torch.save(before, base / "pytorch_model.bin")
    else:
        names = sorted(before)
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, keys in parts.items():
            save_file({key: before[key] for key in keys}, base / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {k: f for f, keys in parts.items() for k in keys}}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "model.safetensors").unlink()
    _, folder = adapt(base, tmp_path / "adapter", ["q_proj"])
    export_adapter(folder, tmp_path / "merged", to="merged")
    after = tensors_of(tmp_path / "merged")
    changed = {key for key in before if not same_bits(before[key], after[key])}
    assert changed == {key for key in before if "q_proj.weight" in key}


def test_a_dtype_that_is_asked_for_spares_what_is_always_wide(tmp_path: Path) -> None:
    base = tmp_path / "base"
    publish(base, deepseek, NOTHING)
    _, folder = adapt(base, tmp_path / "adapter", ["o_proj"])
    export_adapter(folder, tmp_path / "merged", to="merged", dtype="float16")
    before, after = tensors_of(base), tensors_of(tmp_path / "merged")
    wide = {key for key in after if after[key].dtype == torch.float32}
    assert wide == {key for key in before if "e_score_correction_bias" in key}
    assert all(same_bits(before[key], after[key]) for key in wide)
    others = {key for key in after.keys() - wide if after[key].dtype != torch.float16}
    # transformers 5.24 holds the routers' gates wide as well: they stay what the file has.
    assert all("mlp.gate.weight" in key and same_bits(before[key], after[key]) for key in others)


def test_a_base_that_is_published_quantised_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    publish(base, tiny_llama, NOTHING)
    _, folder = adapt(base, tmp_path / "adapter", ["q_proj"])
    quantised = Path(shutil.copytree(base, tmp_path / "quantised"))
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (quantised / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("moelora_plugin.export.run.load_adapter", None)
    with pytest.raises(ExportError, match=r"is published quantised, so nothing can be folded"):
        export_adapter(folder, tmp_path / "merged", to="merged", base=str(quantised))
