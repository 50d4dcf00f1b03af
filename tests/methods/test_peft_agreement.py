"""Where PEFT has a method itself, ours gives what PEFT's gives on the same weights.

The adapters are saved by PEFT, each side loads them its own way, and everything runs in fp64, so
that what differs is a difference of method and not of rounding.
"""

from __future__ import annotations

import functools

import pytest
import torch
from peft import ArrowConfig, PeftModel, XLoraConfig, create_arrow_model, get_peft_model
from saved_loras import routed_over, save_lora, three_loras, tokens
from tiny import tiny_llama
from torch import Tensor, nn

from moelora_plugin.model import moelora_layers
from moelora_plugin.ops.reference import arrow_loop, concatenated, xlora_scalings_loop
from moelora_plugin.routers import Router

# Some thousand roundings of 1e-16 in logits of order 10; the softmax of the gates is in fp64 too.
CLOSE = {"rtol": 1e-9, "atol": 1e-10}

pytestmark = pytest.mark.filterwarnings(  # PEFT's X-LoRA asks transformers by an old name
    "ignore:`is_gradient_checkpointing` is deprecated"
)


class RawGates(Router):
    """The logits themselves: X-LoRA without any softmax, which no router of ours is."""

    def probabilities(self, scores_NE: Tensor, rows) -> Tensor:
        return scores_NE

    def select(self, probs_NE: Tensor, preference_NE: Tensor, rows) -> tuple[Tensor, Tensor | None]:
        return probs_NE, None


SHARED = {"router_score_kwargs": {"bias": True}}
DEEP = {
    "router_score": "mlp",
    "router_score_kwargs": {"width": 16, "depth": 3, "dropout": 0.2},
}
# PEFT's options beside ours.
XLORA = {
    "default": ({}, SHARED),
    "layerwise": ({"layerwise_scalings": True}, {**SHARED, "site_kwargs": {"layerwise": True}}),
    "temperature": (
        {"softmax_temperature": 0.5},
        {**SHARED, "router_modifiers": {"temperature": 0.5}},
    ),
    "top-k": (
        {"top_k_lora": 2},
        {**SHARED, "router": "topk", "top_k": 2, "router_kwargs": {"renormalize": False}},
    ),
    "softmax over the top k": (
        {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
        {**SHARED, "router": "topk", "top_k": 2},
    ),
    "no softmax": ({"enable_softmax": False}, {**SHARED, "router": f"{__name__}.RawGates"}),
    "deep": ({"xlora_depth": 3, "xlora_size": 16}, DEEP),
    "deep, layerwise, with adapters in the first pass": (
        {
            "xlora_depth": 3,
            "xlora_size": 16,
            "layerwise_scalings": True,
            "scaling_pass_value": 0.25,
        },
        {**DEEP, "site_kwargs": {"layerwise": True, "scaling_pass_value": 0.25}},
    ),
}


def llama() -> nn.Module:
    base = tiny_llama().double()
    base.config.use_cache = False  # PEFT's X-LoRA wants it in the base's configuration
    return base


def peft_xlora(paths: list[str], **options) -> PeftModel:
    """PEFT's: it finds adapters by their number only, whatever their keys are called."""
    adapters = {str(i): path for i, path in enumerate(paths)}
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=adapters, **options)
    model = get_peft_model(llama(), config).double()
    torch.manual_seed(3)
    for parameter in model.internal_xlora_classifier.parameters():
        parameter.data.normal_(std=0.5)
    return model.eval()


def classifier(model: PeftModel) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Weight and bias of each of PEFT's linear maps."""
    layers = model.internal_xlora_classifier.layers
    return [(layer.weight, layer.bias) for layer in layers if isinstance(layer, nn.Linear)]


def gate(model: PeftModel) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Ours; it belongs to the first adapted module."""
    owners = [layer for layer in moelora_layers(model).values() if len(layer.moelora_gate)]
    (owner,) = owners
    assert owner is next(iter(moelora_layers(model).values()))
    score = owner.moelora_gate["default"]
    if hasattr(score, "weight"):
        return [(score.weight, score.bias)]
    return [(getattr(score, f"weight_{i}"), getattr(score, f"bias_{i}")) for i in range(3)]


def both(paths: list[str], theirs: dict, ours: dict) -> tuple[PeftModel, PeftModel]:
    """PEFT's and ours, with the same classifier."""
    peft = peft_xlora(paths, **theirs)
    model = routed_over(paths, llama(), site="model", **ours).double()
    with torch.no_grad():
        for mine, yours in zip(gate(model), classifier(peft), strict=True):
            for target, source in zip(mine, yours, strict=True):
                target.copy_(source)
    return peft, model


@pytest.mark.parametrize("case", XLORA)
def test_xlora_is_peft_s(tmp_path, case):
    """The logits, and what a loss makes of the classifier."""
    peft, model = both(three_loras(tmp_path), *XLORA[case])
    found, expected = (m(input_ids=tokens(), labels=tokens()) for m in (model, peft))
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    with model.disable_adapter():
        plain = model(input_ids=tokens()).logits
    assert (plain - found.logits).abs().max() > 0.1  # the adapters are not idle
    assert torch.equal(plain, llama()(input_ids=tokens()).logits)
    found.loss.backward()
    expected.loss.backward()
    for mine, yours in zip(gate(model), classifier(peft), strict=True):
        for target, source in zip(mine, yours, strict=True):
            torch.testing.assert_close(target.grad, source.grad, **CLOSE)
            assert target.grad.any()


def test_experts_that_train_have_peft_s_gradient(tmp_path):
    """The adapters are on in the first pass too, which passes no gradient."""
    theirs, ours = (
        {**first, **second}
        for first, second in zip(
            XLORA["layerwise"],
            ({"use_trainable_adapters": True, "scaling_pass_value": 0.25}, {"expert_kwargs": {}}),
            strict=True,
        )
    )
    ours["site_kwargs"] = {"layerwise": True, "scaling_pass_value": 0.25}
    peft, model = both(three_loras(tmp_path), theirs, ours)
    for m in (peft, model):
        m(input_ids=tokens(), labels=tokens()).loss.backward()
    layers = moelora_layers(model.base_model.model)
    for name, layer in layers.items():
        lora = peft.base_model.lora_model.model.get_submodule(name)
        found = layer.moelora_A["default"].weight.grad.split(4)
        for expert, grad in enumerate(found):
            expected = lora.lora_A[str(expert)].weight.grad
            torch.testing.assert_close(grad[: len(expected)], expected, **CLOSE)
            assert expected.any()


def test_xlora_generates_what_peft_s_does(tmp_path):
    peft, model = both(three_loras(tmp_path), *XLORA["layerwise"])
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": False, "pad_token_id": 2}
    found, expected = (m.generate(input_ids=tokens(), **options) for m in (model, peft))
    assert torch.equal(found, expected)
    assert found.shape[1] > tokens().shape[1]


def test_xlora_is_the_formula(tmp_path):
    """An oracle that neither wrote: hidden states, scalings by loops, weights per token."""
    paths = three_loras(tmp_path)
    model = routed_over(paths, llama(), site="model", **XLORA["layerwise"][1]).double()
    layers = list(moelora_layers(model).values())
    for weight, bias in gate(model):
        nn.init.normal_(weight)
        nn.init.normal_(bias)
    hidden = llama()(input_ids=tokens(), output_hidden_states=True).hidden_states[-1]
    scalings = xlora_scalings_loop(
        hidden.reshape(-1, 32), [(w.detach(), b.detach()) for w, b in gate(model)], 3, len(layers)
    )
    calls = []

    def look(layer, args, output, index):
        x = args[0].reshape(-1, layer.in_features)
        expected = layer.base_layer(args[0]).reshape(len(x), -1)
        for expert in range(3):
            weight = layer.static_update("default", torch.eye(3).double()[expert])
            gates = scalings[:, index, expert, None]
            expected = expected + gates * (x @ weight.T)
        calls.append((output.reshape(len(x), -1), expected))

    for index, layer in enumerate(layers):
        layer.register_forward_hook(functools.partial(look, index=index))
    with torch.no_grad():
        model(input_ids=tokens())
    assert len(calls) == 2 * len(layers)
    for found, expected in calls[len(layers) :]:  # the second pass
        torch.testing.assert_close(found, expected, **CLOSE)


def arrow_model(paths: list[str], general: list[str] | None = None, **options) -> PeftModel:
    """PEFT's Arrow; a seed and fifteen power iterations give its prototypes."""
    config = ArrowConfig(use_gks=general is not None, rng_seed=1, **options)
    model = create_arrow_model(llama(), paths, config, general_adapter_paths=general)
    return model.double().eval()


@pytest.mark.parametrize("subtract", [False, True], ids=["Arrow", "Arrow with GenKnowSub"])
@pytest.mark.parametrize("top_k", [2, 3])
def test_arrow_is_peft_s(tmp_path, top_k, subtract):
    """Where power iteration has converged: the first ranks are far above the others."""
    keys = {"r": 2, "lora_alpha": 6}
    paths = [save_lora(tmp_path / f"{i}", 10 + i, **keys) for i in range(4)]
    general = [save_lora(tmp_path / f"general{i}", 20 + i, std=0.05, **keys) for i in range(2)]
    peft = arrow_model(paths, general if subtract else None, top_k=top_k)
    model = routed_over(
        paths,
        llama(),
        router="topk",
        router_score="prototype",
        top_k=top_k,
        init_kwargs={"subtract": general if subtract else []},
    ).double()
    found, expected = (m(input_ids=tokens()).logits for m in (model, peft))
    # PEFT's prototypes are in fp32, and its iterations end some 1e-6 from the vector.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    plain = llama()(input_ids=tokens()).logits
    assert (found - plain).abs().max() > 1


def test_arrow_is_the_formula(tmp_path):
    """Of adapters that PEFT's Arrow refuses: unlike in rank, and one leaves modules alone."""
    fewer = save_lora(tmp_path / "fewer", 8, r=2, target_modules=["v_proj"])
    paths = [*three_loras(tmp_path), fewer]
    keys = {"router": "topk", "router_score": "prototype", "top_k": 3}
    model = routed_over(paths, llama(), **keys).double()
    for name, layer in moelora_layers(model).items():
        x = torch.randn(9, layer.in_features, dtype=torch.float64)
        scale = layer.moelora_mixture["default"].scaling
        loras = [(a, b, scale) for a, b in layer.expert_weights()]
        if "v_proj" not in name:
            assert not layer.moelora_gate["default"].prototypes[3].any()
            loras = loras[:3]
        # The vectors were found in fp32.
        torch.testing.assert_close(layer.update(x), arrow_loop(x, loras, 3), rtol=1e-5, atol=1e-5)


def test_cat_is_peft_s_concatenation(tmp_path):
    """Learned weights per expert and module that ignore the input, merged for good."""
    paths = three_loras(tmp_path)
    weights = [0.5, 2.0, 0.25]  # which PEFT multiplies into A in fp32, exactly
    peft = PeftModel.from_pretrained(llama(), paths[0], adapter_name="0")
    for i in (1, 2):
        peft.load_adapter(paths[i], adapter_name=f"{i}")
    peft.add_weighted_adapter(["0", "1", "2"], weights, "cat", combination_type="cat")
    peft.set_adapter("cat")
    peft = peft.double().eval()
    model = routed_over(
        paths,
        llama(),
        router="relu",
        router_input="none",
        router_score="static",
        router_score_kwargs={"value": 1.0},
    ).double()
    for layer in moelora_layers(model).values():
        layer.moelora_gate["default"].logits.data.copy_(torch.tensor(weights))
        scale = layer.moelora_mixture["default"].scaling
        loras = [(a, b, scale) for a, b in layer.expert_weights()]
        expected = concatenated(loras, weights)
        torch.testing.assert_close(layer.static_update(), expected, **CLOSE)
    found, expected = (m(input_ids=tokens()).logits for m in (model, peft))
    torch.testing.assert_close(found, expected, **CLOSE)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=tokens()).logits, found, **CLOSE)
    assert not moelora_layers(merged)
