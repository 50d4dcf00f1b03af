"""Adapters on quantised bases: saved whatever comes, known again, and never mixed up in silence."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed import float8_linears, packed_linears, packed_tensors
from peft import PeftModel, get_peft_model
from task_rows import write_data
from tiny import tiny_llama, tiny_tokenizer
from torch import nn

from moelora_plugin import MoeLoraConfig, load_adapter, save_adapter
from moelora_plugin.errors import AdapterError, ConfigError, ExportError
from moelora_plugin.evaluation import EvaluationRequest, evaluate, evaluate_model, subjects
from moelora_plugin.fingerprints import brief_digest, weights_digest

IDS = torch.arange(3, 27).view(2, 12)


def bitsandbytes_nf4(model: nn.Module) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    _each_linear(model, lambda linear: _nf4(bnb, linear))


def torchao_int8(model: nn.Module) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model.model, torchao.Int8WeightOnlyConfig())


def _nf4(bnb: Any, linear: nn.Linear) -> nn.Module:
    packed = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, quant_type="nf4"
    )
    packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    return packed.to("cpu")


def _each_linear(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, make(child))


KINDS = [packed_tensors, packed_linears, float8_linears, bitsandbytes_nf4, torchao_int8]
# torchao and bitsandbytes remark on kernels that they miss, and torch on torchao.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def quantise(request: Any) -> Callable[..., Any]:
    def quantised(seed: int = 0) -> Any:
        base = tiny_llama(hidden=64, seed=seed)
        request.param(base)
        return base.eval()  # bitsandbytes computes otherwise in training, on a CPU

    return quantised


def adapted(base: Any, **keys: Any) -> PeftModel:
    settings = {"r": 2, "num_experts": 3, "top_k": 2, "target_modules": ["q_proj", "up_proj"]}
    torch.manual_seed(1)
    model = get_peft_model(base, MoeLoraConfig(task_type="CAUSAL_LM", **{**settings, **keys}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def saved(quantise: Any, tmp_path: Path) -> Path:
    return save_adapter(adapted(quantise()), tmp_path / "adapter", tokenizer=tiny_tokenizer())


def test_what_was_trained_there_loads_there(quantise: Any, saved: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded, _ = load_adapter(saved, base=quantise())
    assert torch.equal(logits(loaded), logits(adapted(quantise())))
    assert torch.equal(logits(loaded), logits(PeftModel.from_pretrained(quantise(), saved)))
    manifest = json.loads((saved / "moelora.json").read_text())
    assert manifest["base_fingerprint"] is None
    assert isinstance(manifest["base_quantization"], str)


def test_the_base_stays_what_it_is(quantise: Any, tmp_path: Path) -> None:
    base = quantise()
    before = logits(base)
    model = adapted(base)
    expected = logits(model)
    save_adapter(model, tmp_path / "adapter", tokenizer=tiny_tokenizer())
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    # Not one that has computed: PEFT's own way of loading asks it for its state.
    loaded, _ = load_adapter(tmp_path / "adapter", base=quantise())
    assert torch.equal(logits(loaded), expected)
    weights_digest(loaded)
    brief_digest(loaded)
    assert torch.equal(logits(loaded), expected)


def test_on_the_base_in_full_precision_it_warns(saved: Path) -> None:
    with pytest.warns(UserWarning, match=r"trained on a base whose weights were .*are plain, so"):
        load_adapter(saved, base=tiny_llama(hidden=64))
    manifest = json.loads((saved / "moelora.json").read_text())
    for key in ("base_quantization", "base_embeddings", "config"):  # as older releases wrote it
        del manifest[key]
    (saved / "moelora.json").write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match="whose weights were quantised, and those of"):
        load_adapter(saved, base=tiny_llama(hidden=64))


def test_and_the_other_way_round(quantise: Any, tmp_path: Path) -> None:
    save_adapter(adapted(tiny_llama(hidden=64)), tmp_path / "a", tokenizer=tiny_tokenizer())
    with pytest.warns(UserWarning, match="whose weights were plain, and those of"):
        load_adapter(tmp_path / "a", base=quantise())


def test_another_base_is_refused_quantised_or_not(quantise: Any, saved: Path) -> None:
    for other in (quantise(seed=1), tiny_llama(hidden=64, seed=1)):
        with pytest.raises(AdapterError, match="are not those of the base this adapter was"):
            load_adapter(saved, base=other)
    plain = saved.with_name("plain")
    save_adapter(adapted(tiny_llama(hidden=64)), plain, tokenizer=tiny_tokenizer())
    with pytest.raises(AdapterError, match="are not those of the base this adapter was"):
        load_adapter(plain, base=quantise(seed=1))


def test_what_reads_the_base_s_weights_is_refused_in_a_sentence(quantise: Any) -> None:
    model = adapted(quantise(), num_experts=1, top_k=1)
    expected = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ExportError, match="its weight is quantised; load the base in a floa"):
            merge()
    assert torch.equal(logits(model), expected)
    for init in ("pissa", "milora", "segments"):
        with pytest.raises(ConfigError, match=r"quantised; load the base in a floating-point"):
            adapted(quantise(), init=init, num_experts=2)
    base = quantise()
    before = logits(base)
    assert torch.equal(logits(adapted(base).unload()), before)


def test_models_on_it_are_scored(quantise: Any, saved: Path, tmp_path: Path) -> None:
    data = str(write_data(tmp_path / "data", ["rte"]))
    model, tokenizer = load_adapter(saved, base=quantise())
    report = evaluate_model(model, tokenizer, ["rte"], data_dir=data, batch_size=4)
    assert report.models["model"]["base_fingerprint"] is not None


def test_adapters_on_it_are_scored_one_after_the_other(
    quantise: Any, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama(hidden=64).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    loads: list[str] = []

    def load(name: str, **_: Any) -> Any:
        loads.append(name)
        return quantise()

    monkeypatch.setattr(subjects, "load_base_model", load)
    monkeypatch.setenv("MOELORA_CACHE", str(tmp_path / "cache"))
    second = tmp_path / "second"
    save_adapter(adapted(quantise(), r=3), second, tokenizer=tiny_tokenizer())
    request = EvaluationRequest(
        tasks=("rte",),
        adapters=(str(saved), str(second)),
        base=str(tmp_path / "base"),
        data_dir=str(write_data(tmp_path / "data", ["rte"])),
        device="cpu",
        output=tmp_path / "eval.json",
        overwrite=True,
    )
    first = evaluate(request)
    base = quantise()
    before = weights_digest(base)
    logits(base)
    # bitsandbytes packs its weights otherwise when it first computes on a CPU with AVX512-BF16.
    assert len(loads) == (1 if weights_digest(base) == before else 2)
    assert not any(first.details["from_cache"].values())
    assert all(evaluate(request).details["from_cache"].values())


def test_nothing_optional_costs_a_trained_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: nn.Module) -> None:
        raise NotImplementedError("aten.view is not there")

    monkeypatch.setattr("moelora_plugin.recognition.embedding_fingerprint", broken)
    with pytest.warns(UserWarning, match="saved without base_embeddings, .*aten.view is not there"):
        folder = save_adapter(adapted(tiny_llama(hidden=64)), tmp_path / "adapter")
    monkeypatch.undo()
    assert torch.equal(
        logits(load_adapter(folder, base=_named(tiny_llama(hidden=64), tmp_path))[0]),
        logits(adapted(tiny_llama(hidden=64))),
    )


def _named(base: Any, folder: Path) -> Any:
    """A base whose tokenizer can be found."""
    tiny_tokenizer().save_pretrained(folder / "named")
    base.config.save_pretrained(folder / "named")
    base.name_or_path = base.config._name_or_path = str(folder / "named")
    return base
