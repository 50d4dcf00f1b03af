"""One router for the whole model: two passes, in every way that torch and PEFT may run them.

That the logits and gradients are X-LoRA's is in `test_peft_agreement.py`.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from saved_loras import TARGETS, config_over, routed_over, three_loras, tokens
from tiny import enable_checkpointing, tiny_llama
from torch import nn

from moelora_plugin import MoeLoraConfig, build_optimizer
from moelora_plugin.analysis import routing_statistics
from moelora_plugin.errors import ConfigError, ExportError
from moelora_plugin.losses import LossInput, z
from moelora_plugin.model import moelora_layers

# fp32 logits of order 10, which the two sides sum in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
# Every way of deciding about all linears, or about each.
LAYERWISE = [False, True]


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[str]:
    return three_loras(tmp_path_factory.mktemp("loras"))


def xlora(paths: list[str], layerwise: bool = True, **keys) -> PeftModel:
    keys = {"router_score_kwargs": {"bias": True, "std": 1.0}, **keys}
    keys["site_kwargs"] = {"layerwise": layerwise, **keys.get("site_kwargs", {})}
    torch.manual_seed(1)
    return routed_over(paths, site="model", **keys)


def gradients(model: nn.Module, *batches: torch.Tensor, **keys) -> dict[str, torch.Tensor]:
    """Of the summed losses: all forwards before the one backward."""
    model.zero_grad()
    torch.manual_seed(4)
    sum(model(ids, labels=ids, **keys).loss for ids in batches).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def checkpoint(model: PeftModel, use_reentrant: bool) -> None:
    """By the name that this transformers has for it."""
    enable_checkpointing(model.get_base_model(), use_reentrant)


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert found
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], **CLOSE)


@pytest.mark.parametrize("layerwise", LAYERWISE)
def test_the_router_is_one_module_s_and_all_that_trains(paths, layerwise):
    model = xlora(paths, layerwise).train()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    owner = "base_model.model.model.layers.0.self_attn.q_proj.moelora_gate.default"
    assert names == [f"{owner}.weight", f"{owner}.bias"]
    experts = 3 * (6 if layerwise else 1)
    assert model.get_parameter(names[0]).shape == (experts, 32)
    first = model(tokens(), labels=tokens()).loss
    optimizer = build_optimizer(model, "gradamw", lr=1e-2, gate_lr=1e-2)
    first.backward()
    optimizer.step()
    assert model(tokens(), labels=tokens()).loss < first


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("layerwise", LAYERWISE)
def test_saved_and_loaded_bit_by_bit(paths, tmp_path, layerwise, low_cpu_mem_usage, trainable):
    model = xlora(paths, layerwise)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(
        tiny_llama(),
        str(tmp_path),
        is_trainable=trainable,
        low_cpu_mem_usage=low_cpu_mem_usage,
    ).eval()
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    trains = [name for name, p in loaded.named_parameters() if p.requires_grad]
    assert len(trains) == (2 if trainable else 0)


@pytest.mark.parametrize("layerwise", LAYERWISE)
def test_checkpointing_changes_no_gradient(paths, layerwise):
    """Two calls wait for one backward, so each recomputation must find its own decision."""
    keys = {"expert_kwargs": {}, "lora_dropout": 0.3, "aux_losses": {"z": 0.1}}
    expected = gradients(xlora(paths, layerwise, **keys).train(), tokens(), tokens(seed=6))
    model = xlora(paths, layerwise, **keys).train()
    checkpoint(model, use_reentrant=False)
    assert_close(gradients(model, tokens(), tokens(seed=6)), expected)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the first pass
def test_reentrant_checkpointing_is_refused(paths):
    model = xlora(paths).train()
    model.enable_input_require_grads()
    checkpoint(model, use_reentrant=True)
    with pytest.raises(ConfigError, match="set gradient_checkpointing_kwargs to"):
        model(tokens(), labels=tokens())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layerwise", LAYERWISE)
def test_padding_has_no_influence(paths, layerwise, side):
    model = xlora(paths, layerwise)
    ids, padding = tokens(), torch.full((2, 3), 2)
    parts = [padding, ids] if side == "left" else [ids, padding]
    padded = torch.cat(parts, 1)
    mask = (padded != 2).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = model(padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(found[mask.bool()].view(2, 7, -1), model(ids).logits, **CLOSE)


@pytest.mark.parametrize("layerwise", LAYERWISE)
def test_a_sequence_does_not_depend_on_its_batch(paths, layerwise):
    model = xlora(paths, layerwise)
    whole = model(tokens(3)).logits
    torch.testing.assert_close(model(tokens(3)[1:2]).logits, whole[1:2], **CLOSE)


def test_copies_and_pickles_are_models_of_their_own(paths):
    model = xlora(paths).train()
    gradients(model, tokens())  # a decision with a graph is about
    expected = model.eval()(tokens()).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(other(tokens()).logits, expected)
        for name, parameter in other.named_parameters():
            if ".moelora_gate." in name:
                parameter.data.neg_()
        assert not torch.equal(other(tokens()).logits, expected)
        assert torch.equal(model(tokens()).logits, expected)


def test_it_stops_where_the_adapter_does(paths):
    """Disabled, deleted, or unloaded, there is no first pass, and a cache may be used again."""
    plain = tiny_llama()(tokens()).logits
    model = xlora(paths)
    calls = []
    model.base_model.model.model.norm.register_forward_hook(lambda *args: calls.append(1))
    with model.disable_adapter():
        assert torch.equal(model(tokens(), use_cache=True).logits, plain)
    assert len(calls) == 1
    routed = model(tokens()).logits
    assert len(calls) == 3
    model.add_adapter("other", MoeLoraConfig(target_modules=TARGETS))
    model.set_adapter("other")
    assert torch.equal(model(tokens(), use_cache=True).logits, plain)
    model.delete_adapter("default")
    assert torch.equal(model(tokens(), use_cache=True).logits, plain)
    model.add_adapter("default", config_over(paths, site="model"))
    model.set_adapter("default")
    calls.clear()
    assert not torch.equal(model(tokens()).logits, plain)
    assert len(calls) == 2
    assert not torch.equal(routed, plain)
    calls.clear()
    assert torch.equal(model.unload()(tokens(), use_cache=True).logits, plain)
    assert len(calls) == 1


def test_two_adapters_decide_at_once(paths):
    """Each in a first pass without both, so that together they add up in every linear."""
    model = xlora(paths)
    model.add_adapter("other", config_over(paths[:2], site="model"))
    alone = {}
    seen = {}

    def keep(layer, args, output):
        seen["gates"] = {
            name: source.passes.routing(layer)
            for name, source in layer.moelora_gate_source.items()
            if name in layer.active_adapters
        }

    last = list(moelora_layers(model).values())[-1]
    last.register_forward_hook(keep)
    for name in ("default", "other"):
        model.set_adapter(name)
        model(tokens())
        alone[name] = seen["gates"][name].weights
    model.base_model.set_adapter(["default", "other"])
    model(tokens())
    for name, weights in alone.items():
        torch.testing.assert_close(seen["gates"][name].weights, weights, **CLOSE)


@pytest.mark.parametrize("layerwise", LAYERWISE)
def test_an_auxiliary_loss_enters_once(paths, layerwise):
    """Its gradient is that of coefficient times the loss of the decision, without padding."""
    mask = torch.ones_like(tokens())
    mask[0, 4:] = 0
    plain = xlora(paths, layerwise).train()
    model = xlora(paths, layerwise, aux_losses={"z": 0.5}).train()
    with_loss, without = (gradients(m, tokens(), attention_mask=mask) for m in (model, plain))
    source = next(iter(moelora_layers(plain).values())).moelora_gate_source["default"]
    base = tiny_llama()(tokens(), attention_mask=mask, output_hidden_states=True)
    plain.zero_grad()
    routing = source.passes._route(base.hidden_states[-1].detach())
    real = mask.bool().flatten().repeat_interleave(6 if layerwise else 1)
    (0.5 * z(LossInput(routing, real))).backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    for name, grad in expected.items():
        assert grad.abs().max() > 0.01  # of order 1, or the tolerance would hide it
        torch.testing.assert_close(with_loss[name] - without[name], grad, **CLOSE)


@pytest.mark.parametrize("layerwise", LAYERWISE)
def test_what_was_decided_can_be_counted(paths, layerwise):
    model = xlora(paths, layerwise)
    with routing_statistics(model) as statistics:
        model(tokens())
    assert len(statistics.layers) == (6 if layerwise else 1)
    assert all(counts.tokens == tokens().numel() for counts in statistics.layers.values())


@pytest.mark.parametrize(
    "keys",
    [
        {"router_input": "sequence"},
        {"router_score": "mlp", "router_score_kwargs": {"width": 8}},
        {"router_score": "cosine", "router_score_kwargs": {}},
        {"router": "topk", "top_k": 2},
        {"router": "sigmoid"},
        {"universal_expert": "one", "num_experts": 2, "top_k": 2},
        {"gate_rescale": "sqrt", "expert_kwargs": {}},
        {"router_modifiers": {"temperature": 2.0, "noise": 0.1, "expert_dropout": 0.2}},
    ],
    ids=lambda keys: next(iter(keys)),
)
@pytest.mark.parametrize("layerwise", LAYERWISE)
def test_other_parts_go_with_it(paths, layerwise, keys):
    """Anything that decides by rows; every parameter that trains receives a gradient."""
    model = xlora(paths, layerwise, **keys).train()
    grads = gradients(model, tokens())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == grads.keys()
    assert all(grad.isfinite().all() and grad.any() for grad in grads.values())


def test_gates_that_ignore_the_input_merge(paths):
    keys = {
        "router_input": "none",
        "router_score": "static",
        "router_score_kwargs": {},
        "layerwise": False,
    }
    model = xlora(paths, **keys)
    found = model(tokens()).logits
    torch.testing.assert_close(model.merge_and_unload()(tokens()).logits, found, **CLOSE)


@pytest.mark.parametrize("layerwise", LAYERWISE)
def test_gates_that_read_the_input_do_not(paths, layerwise):
    with pytest.raises(ExportError, match="follow the input"):
        xlora(paths, layerwise).merge_and_unload()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(paths, dtype):
    model = xlora(paths).to(dtype)
    logits = model(tokens()).logits
    assert logits.dtype == dtype
    # Some twenty roundings in a row, each of 2^-9 (bf16), on the way to a sharp softmax.
    reference = xlora(paths)(tokens()).logits
    assert (logits.float() - reference).abs().mean() < 0.1 * reference.abs().mean()


def test_autocast(paths):
    model = xlora(paths).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_cache_is_refused(paths):
    model = xlora(paths)
    for call in (
        lambda: model(tokens(), use_cache=True),
        lambda: model.generate(input_ids=tokens(), max_new_tokens=2, pad_token_id=2),
    ):
        with pytest.raises(ConfigError, match="pass use_cache=False"):
            call()
    assert model(tokens()).logits.isfinite().all()  # the model may be called again


def test_a_part_of_the_model_cannot_decide(paths):
    model = xlora(paths)
    model(tokens())
    with pytest.raises(ConfigError, match="call the model, or set site to 'linear'"):
        model.base_model.model.model(tokens())


def test_what_has_no_hidden_states_is_refused():
    net = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="hidden_size in the configuration of Sequential"):
        get_peft_model(net, MoeLoraConfig(target_modules=["0"], site="model"))


def test_a_router_that_reads_the_input_cannot_decide_layer_by_layer(paths):
    with pytest.raises(ConfigError, match=r"site_kwargs\['layerwise'\]"):
        xlora(paths, router="threshold")


def test_all_modules_need_as_many_experts():
    config = MoeLoraConfig(
        target_modules=TARGETS,
        site="model",
        allocation="pattern",
        allocation_kwargs={"num_experts": {"q_proj": 30}},
    )
    with pytest.raises(ConfigError, match="one decision for all modules"):
        get_peft_model(tiny_llama(), config)
