"""What holds for every site: PEFT's surface, checkpointing, copies, saving, training."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import tiny_llama, tiny_tokenizer
from torch import Tensor, nn

from moelora_plugin import MoeLoraConfig, build_optimizer
from moelora_plugin.call import routing_ids
from moelora_plugin.errors import ExportError
from moelora_plugin.export.merged import merge_mean_gate
from moelora_plugin.layers.block import MoeLoraBlock
from moelora_plugin.layers.sites import SITES
from moelora_plugin.model import moelora_layers, places, routed_layers

# transformers 5.23 has a new name for what its older releases, PEFT and Trainer call by this one.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)
MODEL_SITE = "model"  # it takes two passes over the model, and no cache
IDS = torch.randint(3, 500, (2, 8), generator=torch.Generator().manual_seed(0))


def config_for(site: str, **keys: Any) -> MoeLoraConfig:
    targets = {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}
    defaults = {"r": 2, "num_experts": 4, "top_k": 2, "lora_alpha": 6, "lora_dropout": 0.0}
    return MoeLoraConfig(site=site, **{**targets, **defaults, **keys})


def randomize(model: nn.Module, adapter: str = "default", seed: int = 1) -> nn.Module:
    """Every expert and router of an adapter random."""
    torch.manual_seed(seed)
    for layer in moelora_layers(model).values():
        if adapter in layer.moelora_mixture:
            for a, b in layer.expert_weights(adapter):
                a.normal_(std=0.3)
                b.normal_(std=0.3)
    for layer in routed_layers(model).values():
        if adapter in layer.moelora_gate:
            for gate in layer.moelora_gate[adapter].parameters():
                gate.data.normal_()
    return model


def adapted(site: str, **keys: Any) -> PeftModel:
    return randomize(get_peft_model(tiny_llama(), config_for(site, **keys))).eval()


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


every_site = pytest.mark.parametrize("site", SITES)


@every_site
def test_disabled_or_unloaded_it_is_the_base_to_the_bit(site):
    base = tiny_llama()
    keys, expected = base.state_dict().keys(), logits(base)
    model = adapted(site)
    assert not torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(model), expected)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), expected)
    assert unloaded.state_dict().keys() == keys
    assert not any(isinstance(m, MoeLoraBlock) for m in unloaded.modules())
    mlp = unloaded.model.layers[0].mlp
    assert not mlp._forward_hooks
    assert not mlp._forward_pre_hooks
    again = randomize(get_peft_model(unloaded, config_for(site))).eval()
    torch.testing.assert_close(logits(again), logits(adapted(site)), rtol=0, atol=0)


@every_site
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded_it_is_the_same_to_the_bit(site, low_cpu_mem_usage, tmp_path):
    model = adapted(site)
    model.save_pretrained(str(tmp_path))
    kwargs = {"low_cpu_mem_usage": low_cpu_mem_usage}
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path), **kwargs)
    assert not any(p.is_meta for p in loaded.parameters())
    assert torch.equal(logits(loaded), logits(model))
    assert not trainable(loaded)
    # Loaded as a second adapter under another name, beside one of another site.
    other = adapted("linear" if site != "linear" else "block")
    other.load_adapter(str(tmp_path), adapter_name="second", **kwargs)
    other.set_adapter("second")
    assert torch.equal(logits(other), logits(model))


@every_site
def test_adapters_of_several_sites_take_turns(site):
    """Each does what it does alone; deleting one leaves the other as it was."""
    other_site = "block" if site != "block" else "layer"
    alone, other_alone = logits(adapted(site)), logits(adapted(other_site))
    model = get_peft_model(tiny_llama(), config_for(other_site), adapter_name="other")
    model.add_adapter("default", config_for(site))
    assert not any(".default." in name for name in trainable(model))
    randomize(model, "other")
    randomize(model)
    model.eval()
    assert torch.equal(logits(model), other_alone)
    model.set_adapter("default")
    assert torch.equal(logits(model), alone)
    assert all(".default." in name for name in trainable(model))
    assert trainable(model).keys() == trainable(adapted(site)).keys()
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(logits(model), other_alone)
    assert not any(".default." in name for name in model.state_dict())
    model.add_adapter("default", config_for(site))
    randomize(model)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model.eval()), alone)
    assert not any(".other." in name for name in model.state_dict())


@every_site
def test_deleting_the_last_adapter_leaves_the_base(site):
    model = adapted(site)
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model), logits(tiny_llama()))
    assert not any(isinstance(m, MoeLoraBlock) for m in model.modules())


@every_site
def test_copies_and_pickles_do_the_same_and_share_nothing(site):
    model = adapted(site).train()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()  # leaves what calls leave
    expected = logits(model.eval())
    twins = [copy.deepcopy(model)]
    if site != MODEL_SITE:  # transformers' hooks for hidden states cannot be pickled
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twins.append(torch.load(file, weights_only=False))
    for twin in twins:
        assert torch.equal(logits(twin), expected)
        randomize(twin, seed=7)
        assert not torch.equal(logits(twin), expected)
        assert torch.equal(logits(model), expected)
        assert torch.equal(logits(twin.unload()), logits(tiny_llama()))


@every_site
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_no_gradient(site, use_reentrant):
    if site == MODEL_SITE and use_reentrant:
        pytest.skip("refused; tested with that site")

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        keys = {"aux_losses": {"switch_lb": 0.1}, "lora_dropout": 0.3, "gate_rescale": "sqrt"}
        model = adapted(site, **keys).train()
        if checkpointing:
            kwargs = {"use_reentrant": use_reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
            model.enable_input_require_grads()
        torch.manual_seed(2)
        first = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        logits(model.eval(), IDS[:1, :3])  # an evaluation before the backward
        model.train()
        first.backward()
        return {name: p.grad for name, p in trainable(model).items()}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name, grad in plain.items():
        assert grad.count_nonzero(), name
        assert torch.equal(grad, checkpointed[name]), name


@every_site
def test_it_learns(site):
    """Three steps of our optimizer on one batch; nothing else than the adapter moves."""
    # The model's router starts where X-LoRA's does.
    model = adapted(site, aux_losses={"switch_lb": 0.01}, gate_rescale="sqrt").train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, "gradamw", lr=1e-2, gate_lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("site", [site for site in SITES if site != MODEL_SITE])
def test_generation_with_a_cache_reads_the_same_as_without(site):
    model = adapted(site)
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    kwargs = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    cached = model.generate(input_ids=IDS, **kwargs)
    assert torch.equal(cached, model.generate(input_ids=IDS, use_cache=False, **kwargs))


@every_site
def test_bf16_bases_keep_the_adapter_in_fp32(site):
    """Frozen experts too."""
    config = config_for(site, expert="frozen_sparse_a")
    model = get_peft_model(tiny_llama().to(torch.bfloat16), config)
    tensors = [(n, t) for n, t in model.state_dict().items() if "moelora_" in n]
    assert tensors
    assert {t.dtype for _, t in tensors if t.is_floating_point()} == {torch.float32}
    model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()


def test_an_adapter_added_after_unloading_gets_its_ids():
    base = copy.deepcopy(adapted("linear")).unload()
    model = get_peft_model(
        base, config_for("linear", router_input="task", router_score="embedding")
    )
    model(input_ids=IDS, task_id=torch.tensor([1, 2]))


TEXTS = ["Question: is the answer yes or no", "The sentence is grammatically correct"]


@every_site
def test_mean_gate_merges_follow_the_site(site):
    model = adapted(site, **({"num_experts": 1, "top_k": 1} if site == "block" else {}))
    before = logits(model)
    merge = merge_mean_gate(model, tiny_tokenizer(), TEXTS)
    assert merge.layer_errors.keys() == moelora_layers(model).keys()
    errors = {name.rpartition(".")[2]: error for name, error in merge.layer_errors.items()}
    if site == "block":  # one expert: exact up to roundings of fp32
        assert max(errors.values()) < 1e-5
        torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)
    else:
        assert min(errors.values()) > 1e-3
    assert all(layer.merged for layer in moelora_layers(model).values())
    with pytest.raises(ExportError, match="whole feed-forward blocks"):
        merge_mean_gate(adapted("block"), tiny_tokenizer(), TEXTS)


def test_a_merge_that_hangs_on_a_task_is_undone_as_it_was_done():
    model = adapted("linear", router_input="task", router_score="embedding")
    layer = next(iter(moelora_layers(model).values()))
    weight = layer.base_layer.weight.clone()
    with routing_ids(model, task_id=0):
        layer.merge()
    assert not torch.equal(layer.base_layer.weight, weight)
    with routing_ids(model, task_id=1):
        layer.unmerge()
    # Added and taken away again in fp32.
    torch.testing.assert_close(layer.base_layer.weight.data, weight, rtol=1e-6, atol=1e-6)


def test_places_count_the_layers_of_each_tower():
    found = places(
        [
            "visual.blocks.0.attn.qkv",
            "visual.blocks.1.mlp.fc1",
            "language_model.layers.0.mlp.gate_proj",
            "language_model.layers.2.self_attn.q_proj",
            "lm_head",
        ]
    )
    assert [(p.layer, p.num_layers) for p in found.values()] == [
        (0, 2),
        (1, 2),
        (0, 3),
        (2, 3),
        (None, 0),
    ]
