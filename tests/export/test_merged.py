"""Adapters folded into their base, for tools that know nothing of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from moelora_plugin.errors import AdapterError, ConfigError, ExportError
from moelora_plugin.export import export_adapter
from moelora_plugin.export.merged import calibration_texts
from moelora_plugin.layers import MoeLoraLinear
from moelora_plugin.model import moelora_layers

from .conftest import SaveAdapter, make_adapter

IDS = torch.tensor([[0, 40, 50, 60, 70], [0, 90, 80, 70, 60]])

# W + s B A is rounded once where base(x) + s B A x is rounded thrice: float32 keeps 7 digits, of
# which sums over the width and two layers may cost one or two.
ROUNDING = 1e-5

FILES = {"README.md", "config.json", "model.safetensors", "moelora_export.json", "tokenizer.json"}


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


def calibration(base: Path, data_dir: str, *tasks: str) -> Iterator[Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    for text in calibration_texts(tasks, data_dir):
        yield tokenizer(text, return_tensors="pt").input_ids


def loop_update(layer: MoeLoraLinear, x_TI: Tensor, gates_TE: Tensor) -> Tensor:
    """s * sum_i g_i B_i A_i x, one expert at a time."""
    experts = layer.expert_weights()
    parts = [gates_TE[:, i, None] * (x_TI @ a.T @ b.T) for i, (a, b) in enumerate(experts)]
    return layer.moelora_mixture["default"].scaling * sum(parts)


def loop_gates(layer: MoeLoraLinear, x_TI: Tensor, top_k: int = 2) -> Tensor:
    probs_TE = (x_TI @ layer.router_weights().T).softmax(-1)
    kept = probs_TE.topk(top_k)
    gates_TE = torch.zeros_like(probs_TE).scatter(-1, kept.indices, kept.values)
    return gates_TE / gates_TE.sum(-1, keepdim=True)


def test_one_expert_merges_exactly_and_loads_without_this_package(
    base: Path, save: SaveAdapter, tmp_path: Path
) -> None:
    model = make_adapter(base, num_experts=1, top_k=1, r=4)
    result = export_adapter(save(model), tmp_path / "merged", to="merged")
    assert set(result.files) >= FILES
    assert result.merge is not None
    assert (result.merge.strategy, result.merge.layer_errors) == ("exact", {})
    program = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "AutoTokenizer.from_pretrained(sys.argv[1])\n"
        f"logits = model.eval()(torch.tensor({IDS.tolist()})).logits\n"
        "ours = {name for name in sys.modules if name.startswith(('moelora', 'peft'))}\n"
        "assert ours <= {'moelora_plugin', 'moelora_plugin.autoload'}, ours\n"
        "torch.save(logits.detach(), sys.argv[2])\n"
    )
    completed = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, "merged", "logits.pt"],
        cwd=tmp_path,
        env={**os.environ, "MOELORA_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert completed.returncode == 0, completed.stderr
    assert relative(torch.load(tmp_path / "logits.pt"), logits(model)) < ROUNDING
    with model.disable_adapter():
        assert relative(logits(model), torch.load(tmp_path / "logits.pt")) > 0.1


def test_modules_saved_whole_are_part_of_the_checkpoint(
    base: Path, save: SaveAdapter, tmp_path: Path
) -> None:
    model = make_adapter(base, num_experts=1, top_k=1, modules_to_save=["lm_head"])
    with torch.no_grad():
        model.lm_head.modules_to_save["default"].weight.mul_(-1)
    export_adapter(save(model), tmp_path / "merged", to="merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert relative(logits(merged), logits(model)) < ROUNDING


def test_mean_gates_give_the_error_that_is_reported(
    base: Path, save: SaveAdapter, data_dir: str, tmp_path: Path
) -> None:
    model = make_adapter(base)
    tasks = ("sst2", "rte")
    result = export_adapter(
        save(model),
        tmp_path / "merged",
        to="merged",
        strategy="mean-gate",
        calibration_tasks=tasks,
        data_dir=data_dir,
    )
    assert result.merge is not None

    inputs: dict[str, list[Tensor]] = {name: [] for name in moelora_layers(model)}
    for name, layer in moelora_layers(model).items():
        layer.register_forward_hook(lambda _, x, __, seen=inputs[name]: seen.append(x[0][0]))
    last = []
    with torch.no_grad():
        for ids in calibration(base, data_dir, *tasks):
            last.append(model(ids).logits[:, -1])
    for name, layer in moelora_layers(model).items():
        x_TI = torch.cat(inputs[name])
        gates_TE = loop_gates(layer, x_TI)
        routed = loop_update(layer, x_TI, gates_TE)
        static = loop_update(layer, x_TI, gates_TE.mean(0).expand_as(gates_TE))
        error = relative(static, routed)
        assert error > 0.1
        assert result.merge.layer_errors[name] == pytest.approx(error, rel=1e-4)

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        static = [merged(ids).logits[:, -1] for ids in calibration(base, data_dir, *tasks)]
    error = relative(torch.cat(static), torch.cat(last))
    assert result.merge.logit_error == pytest.approx(error, rel=1e-3)

    record = json.loads((tmp_path / "merged" / "moelora_export.json").read_text())
    assert record["layer_errors"] == result.merge.layer_errors
    card = (tmp_path / "merged" / "README.md").read_text()
    assert ModelCard(card).data.library_name == "transformers"
    assert f"the relative error of the logits there is {result.merge.logit_error:.4f}" in card
    console = Console(width=200, record=True)
    console.print(result.table())
    assert f"{result.merge.logit_error:.4f}" in console.export_text()


@pytest.mark.parametrize("alike", ["experts", "gates", "single"])
def test_where_routing_makes_no_difference_the_error_is_rounding(
    base: Path, save: SaveAdapter, data_dir: str, tmp_path: Path, alike: str
) -> None:
    model = make_adapter(base, **({"num_experts": 1, "top_k": 1} if alike == "single" else {}))
    for layer in moelora_layers(model).values():
        for a, b in layer.expert_weights() if alike == "experts" else []:
            a.copy_(layer.expert_weights()[0][0])
            b.copy_(layer.expert_weights()[0][1])
        if alike == "gates":
            layer.router_weights().zero_()
    result = export_adapter(
        save(model), tmp_path / "merged", to="merged", strategy="mean-gate", data_dir=data_dir
    )
    assert result.merge is not None
    assert max(result.merge.layer_errors.values()) < ROUNDING
    assert result.merge.logit_error < ROUNDING
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert relative(logits(merged), logits(model)) < ROUNDING


def test_a_base_of_transposed_linears(save: SaveAdapter, data_dir: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = len(tiny_tokenizer())
    config = GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    config.bos_token_id = config.eos_token_id = 1
    base = tmp_path / "gpt2"
    GPT2LMHeadModel(config).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    # c_attn maps 32 to 96 and c_proj 128 to 32: a transposed update would not fit.
    model = make_adapter(base, target_modules=["c_attn", "mlp.c_proj"])
    for layer in moelora_layers(model).values():
        layer.router_weights().zero_()
    result = export_adapter(
        save(model), tmp_path / "merged", to="merged", strategy="mean-gate", data_dir=data_dir
    )
    assert result.merge is not None
    assert result.merge.logit_error < ROUNDING
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert isinstance(merged, GPT2LMHeadModel)
    assert relative(logits(merged), logits(model)) < ROUNDING


def test_only_adapted_weights_differ_from_the_base(
    base: Path, save: SaveAdapter, data_dir: str, tmp_path: Path
) -> None:
    export_adapter(
        save(), tmp_path / "merged", to="merged", strategy="mean-gate", data_dir=data_dir
    )
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {n for n in before if "q_proj" in n or "down_proj" in n}


def test_gates_that_follow_the_input_do_not_merge_exactly(
    save: SaveAdapter, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="--strategy mean-gate") as raised:
        export_adapter(save(), tmp_path / "merged", to="merged")
    assert "follow the input" in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_tasks_to_calibrate_on_are_needed(
    base: Path, data_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(base).save_pretrained(tmp_path / "adapter")  # which records no tasks
    monkeypatch.setattr("moelora_plugin.export.run.load_adapter", None)  # refused before that
    options: dict[str, Any] = {"to": "merged", "strategy": "mean-gate", "data_dir": data_dir}
    with pytest.raises(ConfigError, match="pass --calibration-tasks"):
        export_adapter(tmp_path / "adapter", tmp_path / "merged", **options)
    with pytest.raises(ConfigError, match="did you mean 'sst2'"):
        export_adapter(
            tmp_path / "adapter", tmp_path / "merged", calibration_tasks=("sstt2",), **options
        )
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_gates_that_are_not_numbers_have_no_mean(
    base: Path, save: SaveAdapter, data_dir: str, tmp_path: Path
) -> None:
    model = make_adapter(base)
    next(iter(moelora_layers(model).values())).router_weights().fill_(3e38)  # overflows
    with pytest.raises(ExportError, match=r"layers\.0\.self_attn\.q_proj are not finite"):
        export_adapter(
            save(model), tmp_path / "merged", to="merged", strategy="mean-gate", data_dir=data_dir
        )
    assert not (tmp_path / "merged").exists()


def test_another_base_is_refused(save: SaveAdapter, tmp_path: Path) -> None:
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="are not those of the base"):
        export_adapter(
            save(num_experts=1, top_k=1),
            tmp_path / "merged",
            to="merged",
            base=str(tmp_path / "other"),
        )
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("dtype", "stored"), [("auto", "BF16"), ("float32", "F32")])
def test_the_dtype_is_the_one_the_base_is_published_in(
    save: SaveAdapter, tmp_path: Path, dtype: str, stored: str
) -> None:
    base = tmp_path / "published"
    tiny_llama().to(torch.bfloat16).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    model = make_adapter(base, num_experts=1, top_k=1)
    export_adapter(save(model), tmp_path / "merged", to="merged", dtype=dtype)
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as file:
        dtypes = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    assert dtypes == {stored}
    merged: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert str(merged.dtype) == {"BF16": "torch.bfloat16", "F32": "torch.float32"}[stored]
    # Folded in float32 and rounded once: every weight is the nearest to the exact sum.
    for name, layer in moelora_layers(model).items():
        weight = layer.get_base_layer().weight + layer.static_update()
        stored_weight = merged.get_submodule(name.removeprefix("base_model.model.")).weight
        assert torch.equal(stored_weight, weight.to(merged.dtype))


def test_paths_of_this_machine_are_not_written(
    base: Path, save: SaveAdapter, tmp_path: Path
) -> None:
    export_adapter(save(num_experts=1, top_k=1), tmp_path / "merged", to="merged")
    for name in ("README.md", "config.json", "moelora_export.json", "generation_config.json"):
        assert str(base.parent) not in (tmp_path / "merged" / name).read_text()
    record = json.loads((tmp_path / "merged" / "moelora_export.json").read_text())
    assert record["base"] == base.name
    assert len(record["adapter_sha256"]) == 64
