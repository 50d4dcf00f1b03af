"""Merging: exact where the gates do not depend on the input, refused otherwise."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_llama, tiny_tokenizer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from moelora_plugin import MoeLoraConfig, load_adapter, save_adapter
from moelora_plugin.errors import ExportError
from moelora_plugin.export.merged import merge_mean_gate
from moelora_plugin.layers import MoeLoraLinear
from moelora_plugin.model import moelora_layers

IDS = torch.arange(3, 27).view(2, 12)
# (W + s B A) x instead of W x + s B (A x): other roundings in float64, through two layers.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def gpt2() -> GPT2LMHeadModel:
    """Its linears are transformers' Conv1D, whose weight is transposed."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config).eval()


BASES = {
    "linear": (lambda: tiny_llama(hidden=16), ["q_proj", "v_proj", "down_proj"]),
    "Conv1D": (gpt2, ["c_attn", "c_proj"]),
}
STATIC = {
    "one expert": {"num_experts": 1, "top_k": 1},
    "fixed gates": {"num_experts": 2, "top_k": 2, "router": "fixed_gates.ThreeQuarters"},
}


def adapted(kind: str, **keys):
    build, targets = BASES[kind]
    config = MoeLoraConfig(r=2, lora_dropout=0.1, target_modules=targets, **keys)
    model = get_peft_model(build().double(), config)
    torch.manual_seed(1)
    for layer in moelora_layers(model).values():
        for _, b in layer.expert_weights():
            b.normal_(std=0.3)
    return model.double().eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("gates", STATIC)
@pytest.mark.parametrize("kind", BASES)
def test_merged_it_gives_the_same_logits_without_the_adapter(kind, gates):
    model = adapted(kind, **STATIC[gates])
    expected = logits(model)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert not [m for m in merged.modules() if isinstance(m, MoeLoraLinear)]
    assert type(merged) is type(BASES[kind][0]())
    torch.testing.assert_close(logits(merged), expected, **CLOSE)
    assert not torch.allclose(expected, logits(BASES[kind][0]().double()))


@pytest.mark.parametrize("kind", BASES)
def test_merged_in_place_and_taken_out_again(kind):
    model = adapted(kind, **STATIC["one expert"])
    plain, expected = logits(BASES[kind][0]().double()), logits(model)
    model.merge_adapter()
    assert all(layer.merged for layer in moelora_layers(model).values())
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    model.unmerge_adapter()
    assert not any(layer.merged for layer in moelora_layers(model).values())
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    for layer in moelora_layers(model).values():
        # Adding and taking away rounds twice.
        torch.testing.assert_close(
            layer.base_layer(torch.ones(layer.in_features).double()),
            (
                layer(torch.ones(layer.in_features).double())
                - layer.update(torch.ones(layer.in_features).double())
            ),
            **CLOSE,
        )
    model.merge_adapter()
    with model.disable_adapter():  # unmerges on its own
        torch.testing.assert_close(logits(model), plain, **CLOSE)


def test_unmerging_what_is_not_merged_warns():
    with pytest.warns(UserWarning, match="Already unmerged"):
        adapted("linear", **STATIC["one expert"]).unmerge_adapter()


@pytest.mark.parametrize("way", ["merge_and_unload", "merge_adapter"])
def test_a_routed_adapter_is_refused_with_the_way_out(way):
    model = adapted("linear", num_experts=3, top_k=2)
    expected = logits(model)
    with pytest.raises(ExportError) as caught:
        getattr(model, way)()
    assert str(caught.value) == (
        "The gates of this adapter follow the input, so no single weight equals it; serve it "
        "unmerged, or write an approximation with `moelora export ADAPTER --to merged --strategy "
        "mean-gate "
        "--out DIR`."
    )
    assert torch.equal(logits(model), expected)  # nothing was touched


def test_a_quantised_weight_is_refused():
    class Int8Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features = self.out_features = 4
            self.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)

        def forward(self, x):
            return x @ self.weight.to(x.dtype)

    config = MoeLoraConfig(num_experts=1, top_k=1, target_modules=["0"])
    model = get_peft_model(nn.Sequential(Int8Linear()), config)
    with pytest.raises(
        ExportError, match=r"^Cannot merge into Int8Linear: its weight is quantised; load"
    ):
        model.merge_and_unload()


def test_safe_merging_refuses_weights_that_are_not_finite():
    model = adapted("linear", **STATIC["one expert"])
    layer = next(iter(moelora_layers(model).values()))
    layer.expert_weights()[0][1][0, 0] = float("nan")
    with pytest.raises(
        ExportError, match=r"^Merging adapter 'default' gives NaN or infinite weights"
    ):
        model.merge_and_unload(safe_merge=True)


def test_the_base_keeps_its_dtype():
    model = adapted("linear", **STATIC["one expert"]).to(torch.bfloat16)
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}


def into_mean_gates(model):
    merge_mean_gate(model, tiny_tokenizer(), ["text"])


def adapted_head():
    config = MoeLoraConfig(num_experts=1, top_k=1, r=2, target_modules=["lm_head"])
    model = get_peft_model(gpt2(), config).eval()
    for layer in moelora_layers(model).values():
        for _, b in layer.expert_weights():
            b.normal_(std=0.3)
    return model


# PEFT says so too, and merges all the same.
@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|save_embedding_layers)")
@pytest.mark.parametrize(
    "merge",
    [lambda model: model.merge_adapter(), lambda model: model.merge_and_unload(), into_mean_gates],
)
def test_a_weight_that_another_module_reads_is_not_merged_into(merge):
    """The embeddings of a base with tied weights are its head's."""
    model = adapted_head()
    expected = logits(model)
    with pytest.raises(ExportError, match="lm_head shares its weight with another module"):
        merge(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|save_embedding_layers)")
def test_such_an_adapter_is_served_beside_its_base(tmp_path):
    model = adapted_head()
    folder = save_adapter(model, tmp_path / "adapter", tokenizer=tiny_tokenizer())
    loaded, _ = load_adapter(folder, base=gpt2(), fold=True)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


class _Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class _Squashed(nn.Linear):
    def forward(self, x):
        return torch.tanh(super().forward(x))


class _Normed(nn.Linear):
    """Multiplies by rows of length one, whatever the weight's are."""

    def forward(self, x):
        return nn.functional.linear(x, nn.functional.normalize(self.weight), self.bias)


class _ByHand(nn.Linear):
    """Falcon's: another way to write the same product."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class _Casting(nn.Linear):
    def forward(self, x):
        product = nn.functional.linear(x.float(), self.weight.float(), self.bias.float())
        return product.to(x.dtype)


def one_linear(linear: nn.Module):
    """A model of it, with one expert that is not zero."""
    config = MoeLoraConfig(num_experts=1, top_k=1, r=2, target_modules=["linear"])
    model = get_peft_model(nn.Sequential(OrderedDict(linear=linear)), config)
    for layer in moelora_layers(model).values():
        for _, b in layer.expert_weights():
            b.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("kind", [_ByHand, _Casting])
def test_a_linear_written_by_hand_is_merged(kind):
    model, x = one_linear(kind(6, 5).double()), torch.randn(3, 6).double()
    expected = model(x)

    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [_Doubled, _Squashed, _Normed])
def test_a_forward_that_does_more_than_multiply_is_not_merged_into(kind):
    model, x = one_linear(kind(6, 5)), torch.randn(3, 6)
    expected = model(x)

    with pytest.raises(ExportError, match=f"{kind.__name__}: its forward does more to the input"):
        model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "compute",
    [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm],
    ids=lambda f: f.__name__,
)
def test_a_weight_that_is_computed_is_not_merged_into(compute):
    model = one_linear(compute(nn.Linear(6, 5)))

    with pytest.raises(ExportError, match="its weight is computed from other parameters"):
        model.merge_adapter()
