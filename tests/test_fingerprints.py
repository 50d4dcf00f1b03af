"""What tells one model from another."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from packed import PackedTensor, float8_linears, packed_linears, packed_tensors
from tiny import tiny_llama
from torch import nn

from moelora_plugin.fingerprints import (
    UnreadableError,
    brief_digest,
    embedding_fingerprint,
    samples_of,
    weights_digest,
)
from moelora_plugin.quantization import quantization_of

PACK = {
    "tensors": (packed_tensors, "PackedTensor"),
    "linears": (packed_linears, "PackedLinear"),
    "float8": (float8_linears, "Float8Linear"),
}


def permuted(model: nn.Module) -> None:
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.copy_(weight.flip(0))


def swapped(model: nn.Module) -> None:
    """Two tensors of one shape, and nothing else, change places."""
    q = model.model.layers[0].self_attn.q_proj.weight
    o = model.model.layers[0].self_attn.o_proj.weight
    kept = q.clone()
    q.copy_(o)
    o.copy_(kept)


def last_bit(model: nn.Module) -> None:
    model.lm_head.weight.view(torch.int32)[-1, -1] ^= 1


def sign_of_zero(model: nn.Module) -> None:
    model.lm_head.weight[0, 0] = -0.0


def narrower(model: nn.Module) -> None:
    model.lm_head.to(torch.bfloat16)


def reshaped(model: nn.Module) -> None:
    weight = model.lm_head.weight
    model.lm_head.weight = nn.Parameter(weight.detach().reshape(weight.shape[::-1]))


def with_a_buffer(model: nn.Module) -> None:
    model.lm_head.register_buffer("more", torch.zeros(1))


@pytest.mark.parametrize(
    "change",
    [permuted, swapped, last_bit, sign_of_zero, narrower, reshaped, with_a_buffer],
    ids=lambda change: change.__name__,
)
def test_every_change_of_a_model_is_another_digest(change: Callable[[nn.Module], None]) -> None:
    one, other = tiny_llama(), tiny_llama()
    with torch.no_grad():
        for model in (one, other):
            model.lm_head.weight[0, 0] = 0.0
        assert weights_digest(one) == weights_digest(other)
        change(other)
    assert weights_digest(one) != weights_digest(other)


@pytest.mark.parametrize("kind", PACK)
def test_packed_weights_have_a_digest_of_their_bytes(kind: str) -> None:
    pack, name = PACK[kind]
    plain, one, same, other = tiny_llama(), tiny_llama(), tiny_llama(), tiny_llama(seed=1)
    for model in (one, same, other):
        pack(model)
    assert weights_digest(one) == weights_digest(same)
    assert len({weights_digest(model) for model in (plain, one, other)}) == 3
    assert brief_digest(one) == brief_digest(same) != brief_digest(other)
    assert (quantization_of(plain), quantization_of(one)) == (None, name)
    # The embeddings stay what they were, and say which base it is.
    assert embedding_fingerprint(one) == embedding_fingerprint(plain)
    assert embedding_fingerprint(other) != embedding_fingerprint(plain)


def test_one_packed_value_makes_a_difference() -> None:
    one, other = tiny_llama(), tiny_llama()
    for model in (one, other):
        packed_tensors(model)
    other.model.layers[1].mlp.up_proj.weight.data.packed[3, 3] ^= 1
    assert weights_digest(one) != weights_digest(other)


def test_weights_that_are_elsewhere_have_no_digest() -> None:
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(UnreadableError, match=r"embed_tokens\.weight has no values here"):
        weights_digest(model)
    assert brief_digest(model) is None
    assert embedding_fingerprint(model) is None


def test_only_plain_numbers_are_sampled() -> None:
    weight = torch.randn(4, 8)
    assert samples_of([weight]) == [float(weight.view(-1)[2 * k + 1]) for k in range(16)]
    for other in (
        PackedTensor.of(weight),
        weight.to(torch.float8_e4m3fn),
        weight.to(torch.int8),
        weight.to("meta"),
        torch.empty(0),
        None,
    ):
        assert samples_of([other]) is None
        assert samples_of([weight, other]) is None
    assert samples_of([]) is None


def test_a_digest_is_not_what_one_waits_for() -> None:
    model = nn.Linear(8192, 8192, bias=False)  # a quarter of a GB, in fp32
    began = time.perf_counter()
    weights_digest(model)
    # 0.15 s alone on one core; ten times that where others use it too.
    assert time.perf_counter() - began < 1.5
