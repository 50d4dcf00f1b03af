"""Experts from saved LoRA adapters: what PEFT makes of them, and what happens without the files.

Every adapter here is saved by PEFT.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from saved_loras import routed_over, save_lora, three_loras, tokens
from tiny import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from moelora_plugin import build_optimizer
from moelora_plugin.errors import AdapterError, ConfigError
from moelora_plugin.initialization import adapters as module
from moelora_plugin.model import moelora_layers
from moelora_plugin.ops.reference import general_knowledge_subtracted

# One product in fp32 with sums of at most 64 terms of order 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def updates(model) -> dict[str, list[torch.Tensor]]:
    """s B_i A_i of each expert by module, in the base weight's layout."""
    found = {}
    for name, layer in moelora_layers(model.base_model.model).items():
        eye = torch.eye(layer.moelora_mixture["default"].plan.num_experts)
        found[name] = [layer.static_update("default", one_hot) for one_hot in eye]
    return found


def peft_updates(path: str, base=None) -> dict[str, torch.Tensor]:
    """What PEFT would merge, by module."""
    model = PeftModel.from_pretrained(tiny_llama() if base is None else base, path)
    return {
        name: layer.get_delta_weight("default").detach()
        for name, layer in model.base_model.model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def assert_same_updates(model, paths, base=None) -> None:
    for i, path in enumerate(paths):
        theirs = peft_updates(path, None if base is None else base())
        for name, experts in updates(model).items():
            expected = theirs.get(name, torch.zeros_like(experts[i]))
            torch.testing.assert_close(experts[i], expected, **CLOSE)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("use_rslora", [True, False])
def test_each_expert_s_update_is_its_adapter_s(tmp_path, frozen, use_rslora):
    """Whatever scale the layer has: rank, alpha and their patterns are each adapter's own."""
    paths = [
        *three_loras(tmp_path),
        save_lora(
            tmp_path / "patterns",
            7,
            r=1,
            lora_alpha=5,
            rank_pattern={"down_proj": 4, "layers.1.self_attn.q_proj": 3},
            alpha_pattern={"v_proj": 9},
        ),
        save_lora(tmp_path / "fewer", 8, r=2, target_modules=["v_proj"]),
    ]
    model = routed_over(paths, expert_kwargs={"frozen": frozen}, use_rslora=use_rslora)
    assert_same_updates(model, paths)


def test_a_conv1d_s_adapter_too(tmp_path):
    """GPT-2's weights are transposed; its LoRA factors are not."""

    def base():
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2)
        )

    keys = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    paths = [save_lora(tmp_path / f"{i}", i, base(), **keys) for i in range(2)]
    model = routed_over(paths, base(), target_modules=["c_attn"], r=8)
    assert_same_updates(model, paths, base)


def test_one_adapter_alone_is_peft_s_model(tmp_path):
    (path,) = three_loras(tmp_path)[:1]
    ours = routed_over([path], router="topk")
    theirs = PeftModel.from_pretrained(tiny_llama(), path).eval()
    found, expected = ours(tokens()).logits, theirs(tokens()).logits
    # The scale is folded into B instead of multiplying the update: logits of order 10 in fp32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    with ours.disable_adapter():
        assert torch.equal(ours(tokens()).logits, tiny_llama()(tokens()).logits)


def test_frozen_experts_leave_the_router_to_train(tmp_path):
    model = routed_over(three_loras(tmp_path)).train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".moelora_gate." in name for name in trained)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = build_optimizer(model, "gradamw", lr=1e-2, gate_lr=1e-2)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in trained), name


@pytest.mark.parametrize("optimizer", ["rsgd", "gradamw"])
def test_experts_that_are_not_frozen_train_on_from_the_adapters(tmp_path, optimizer):
    fewer = save_lora(tmp_path / "fewer", 8, r=2, target_modules=["v_proj"])
    model = routed_over([*three_loras(tmp_path), fewer], expert_kwargs={}, r=8).train()
    first = model(tokens(), labels=tokens()).loss
    steps = build_optimizer(model, optimizer, lr=1e-2, gate_lr=1e-2)
    first.backward()
    for layer in moelora_layers(model).values():
        # A rank that fills up, and an expert whose adapter left the module alone, learn as well.
        for (_, b), grad in zip(
            layer.expert_weights(), layer.moelora_B.default.weight.grad.split(8, 1), strict=True
        ):
            assert grad[:, b.any(0).logical_not()].any()
    steps.step()
    assert model(tokens(), labels=tokens()).loss < first


def test_what_fills_up_a_frozen_expert_is_zero(tmp_path):
    paths = [save_lora(tmp_path / "small", 3, r=2)]
    for layer in moelora_layers(routed_over(paths, r=5)).values():
        ((a, b),) = layer.expert_weights()
        assert not a[2:].any()
        assert not b[:, 2:].any()
        assert a[:2].any()


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("score", ["linear", "prototype"])
def test_a_saved_adapter_needs_its_sources_no_more(
    tmp_path, trainable, low_cpu_mem_usage, frozen, score
):
    paths = three_loras(tmp_path / "sources")
    model = routed_over(paths, expert_kwargs={"frozen": frozen}, router_score=score)
    model.save_pretrained(str(tmp_path / "ours"))
    shutil.rmtree(tmp_path / "sources")
    loaded = PeftModel.from_pretrained(
        tiny_llama(),
        str(tmp_path / "ours"),
        is_trainable=trainable,
        low_cpu_mem_usage=low_cpu_mem_usage,
    ).eval()
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    state, expected = loaded.state_dict(), model.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    names = [name for name, p in loaded.named_parameters() if p.requires_grad]
    assert bool(names) == (trainable and not (frozen and score == "prototype"))
    loaded.save_pretrained(str(tmp_path / "again"))
    files = (tmp_path / name / "adapter_model.safetensors" for name in ("ours", "again"))
    assert len({file.read_bytes() for file in files}) == 1


def test_general_adapters_are_subtracted_factor_by_factor(tmp_path):
    keys = {"r": 2, "lora_alpha": 6}
    paths, general = (
        [save_lora(tmp_path / f"{kind}{i}", 20 + 5 * len(kind) + i, **keys) for i in range(2)]
        for kind in ("task", "general")
    )
    model = routed_over(paths, init_kwargs={"subtract": general})

    def factors(path: str, name: str):
        layer = PeftModel.from_pretrained(tiny_llama(), path).get_submodule(
            f"base_model.model.{name}"
        )
        return layer.lora_A.default.weight.detach(), layer.lora_B.default.weight.detach()

    for name, experts in updates(model).items():
        loras = [(*factors(path, name), 3.0) for path in paths]
        others = [factors(path, name) for path in general]
        for found, (a, b, scale) in zip(
            experts, general_knowledge_subtracted(loras, others), strict=True
        ):
            torch.testing.assert_close(found, scale * b @ a, **CLOSE)


def test_general_adapters_need_the_experts_rank(tmp_path):
    paths = three_loras(tmp_path)
    with pytest.raises(ConfigError, match=r"init_kwargs\['subtract'\] need the rank"):
        routed_over(paths, init_kwargs={"subtract": paths[:1]})


def test_a_hub_id_is_downloaded_once(tmp_path, monkeypatch):
    save_lora(tmp_path / "repo" / "inside" / "it", 3, r=2)
    save_lora(tmp_path / "repo", 4, r=2)
    asked = []

    def download(repo, allow_patterns):
        asked.append((repo, tuple(allow_patterns)))
        return str(tmp_path / "repo")

    monkeypatch.setattr(module, "snapshot_download", download)
    module._download.cache_clear()
    model = routed_over(["user/loras", "user/loras/inside/it"])
    module._download.cache_clear()
    assert_same_updates(model, [str(tmp_path / "repo"), str(tmp_path / "repo" / "inside" / "it")])
    files = ("adapter_config.json", "adapter_model.safetensors")
    inside = tuple(f"inside/it/{file}" for file in files)
    assert asked == [("user/loras", files), ("user/loras", inside)]


def change_config(path: str, **keys) -> None:
    file = Path(path) / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def truncate(path: str) -> None:
    file = Path(path) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "keys", "message"),
    [
        (shutil.rmtree, {}, "is not a folder and cannot be had from the hub"),
        (lambda p: (Path(p) / "adapter_config.json").unlink(), {}, "holds no adapter_config.json"),
        (lambda p: (Path(p) / "adapter_config.json").write_text("{"), {}, "is not valid JSON"),
        (truncate, {}, "truncated or damaged"),
        (lambda p: change_config(p, peft_type="IA3"), {}, "has peft_type='IA3'"),
        (lambda p: change_config(p, use_dora=True), {}, "has use_dora"),
        (lambda p: change_config(p, bias="all"), {}, "has bias='all'"),
        (lambda p: change_config(p, modules_to_save=["lm_head"]), {}, "has modules_to_save"),
        (
            lambda p: change_config(p, init_lora_weights="pissa_niter_4"),
            {},
            "has init_lora_weights",
        ),
        (None, {"r": 1}, "has rank 2 in .*; raise r"),
        (None, {"num_experts": 3}, "names 1 adapters for 3 experts .*; set num_experts"),
        (None, {"target_modules": ["q_proj"]}, "also adapts 'model.layers.0.mlp.down_proj'"),
        (None, {"init_kwargs": {"paths": "x"}}, r"init_kwargs\['paths'\]='x' must be a list"),
        (None, {"init_kwargs": {"paths": []}}, "must name an adapter for each expert"),
        (None, {"init_kwargs": {"path": []}}, "init_kwargs has no key 'path'"),
    ],
)
def test_what_cannot_become_an_expert_is_refused_in_one_sentence(tmp_path, spoil, keys, message):
    path = save_lora(tmp_path / "lora", 1, r=2)
    if spoil is not None:
        spoil(path)
    with pytest.raises((ConfigError, AdapterError), match=message) as caught:
        routed_over([path], **{"num_experts": 1, "top_k": 1, **keys})
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")  # PEFT's, while saving
def test_so_is_what_peft_really_saves_of_other_kinds(tmp_path, keys):
    path = save_lora(tmp_path / "lora", 1, **keys)
    with pytest.raises(AdapterError, match="only plain LoRA on linear modules"):
        routed_over([path], r=8)


def test_another_type_of_adapter_is_refused(tmp_path):
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    get_peft_model(tiny_llama(), config).save_pretrained(str(tmp_path / "ia3"))
    with pytest.raises(AdapterError, match="peft_type='IA3'"):
        routed_over([str(tmp_path / "ia3")])


def test_an_adapter_of_another_base_is_refused(tmp_path):
    path = save_lora(tmp_path / "wide", 1, tiny_llama(hidden=64), r=2)
    with pytest.raises(ConfigError, match=r"of shape \(2, 64\) .* trained on this base"):
        routed_over([path])


def test_experts_that_share_a_factor_cannot_be_adapters(tmp_path):
    with pytest.raises(ConfigError, match="set expert to 'lora'"):
        routed_over(three_loras(tmp_path), expert="shared_a", expert_kwargs={})


def test_the_universal_expert_is_the_last_path(tmp_path):
    paths = three_loras(tmp_path)
    model = routed_over(paths, num_experts=2, top_k=2, universal_expert="one")
    for layer in moelora_layers(model).values():
        assert len(layer.expert_weights()) == 3
    name = "model.layers.0.self_attn.v_proj"
    layer = model.get_submodule(f"base_model.model.{name}")
    found = layer.static_update("default", torch.zeros(2))
    torch.testing.assert_close(found, peft_updates(paths[2])[name], **CLOSE)


def test_gates_that_were_trained_apart_route_together(tmp_path):
    """PHATGOOSE: a sigmoid gate per adapter, each trained alone, then the two best by cosine.

    The scores are written out here: LayerNorm(x) . LayerNorm(v) / sqrt(I), a softmax over two.
    """
    paths = three_loras(tmp_path)
    together = routed_over(
        paths,
        router="topk",
        top_k=2,
        router_score="prototype",
        router_score_kwargs={"compare": "standardized"},
    )
    layers = moelora_layers(together.base_model.model)
    for expert, path in enumerate(paths):
        alone = routed_over([path], router="sigmoid", router_score_kwargs={"std": 0.0}).train()
        steps = build_optimizer(alone, "gradamw", lr=1e-2, gate_lr=1e-2)
        first = alone(tokens(), labels=tokens()).loss
        first.backward()
        steps.step()
        assert alone(tokens(), labels=tokens()).loss < first
        for name, layer in moelora_layers(alone.base_model.model).items():
            prototypes = layers[name].moelora_gate["default"].prototypes
            prototypes[expert] = layer.router_weights()[0]
    for layer in layers.values():
        x = torch.randn(5, layer.in_features)
        standard = [
            (v - v.mean(-1, keepdim=True)) / (v.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
            for v in (x, layer.moelora_gate["default"].prototypes)
        ]
        scores = standard[0] @ standard[1].T / layer.in_features**0.5
        outputs = torch.stack([x @ layer.static_update("default", e).T for e in torch.eye(3)], 1)
        expected = []
        for row, values in zip(outputs, scores, strict=True):
            best = values.argsort(descending=True)[:2]
            expected.append((values[best].softmax(-1).unsqueeze(-1) * row[best]).sum(0))
        torch.testing.assert_close(layer.update(x), torch.stack(expected), rtol=1e-4, atol=1e-4)
