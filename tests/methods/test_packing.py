"""Several sequences in one row: each is decided about as if it were alone.

Hosts say in different ways where one ends; `SAYING` has them all, and every contract runs over it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapted_llama import NEEDS, adapted_llama, cache_of, sentences
from peft import PeftModel

from moelora_plugin import routing_ids
from moelora_plugin.analysis.routing import routing_statistics
from moelora_plugin.call import read_call
from moelora_plugin.errors import ConfigError
from moelora_plugin.losses import LossInput, localized_cv2
from moelora_plugin.model import routed_layers
from moelora_plugin.types import Documents, Routing

LENGTHS = ((4, 1, 3), (2, 6, 0))  # of the documents in each row; what is left is padding
WIDTH = 9
# fp64: a few hundred roundings on logits of size 10, summed in another order.
NEAR = {"rtol": 0, "atol": 1e-9}


def documents() -> list[list[torch.Tensor]]:
    rows = []
    for seed, lengths in enumerate(LENGTHS):
        pieces = sentences(len(lengths), WIDTH, seed=seed + 1)
        rows.append([p[:n] for p, n in zip(pieces, lengths, strict=True) if n])
    return rows


def filled(pieces: list[torch.Tensor], value: int = 0) -> torch.Tensor:
    row = torch.cat(pieces)
    return torch.nn.functional.pad(row, (0, WIDTH - len(row)), value=value)


def block_mask(numbers: torch.Tensor) -> torch.Tensor:
    """Finished: each token sees those of its own document that come before (B, 1, S, S)."""
    same = numbers[:, :, None] == numbers[:, None, :]
    return (same & torch.ones(WIDTH, WIDTH).tril().bool())[:, None]


def packed(saying: str) -> dict[str, Any]:
    """A batch of packed rows, with what a host says about it; attention is always told."""
    rows = documents()
    ids = torch.stack([filled(row, 2) for row in rows])
    positions = torch.stack([filled([torch.arange(len(p)) for p in row]) for row in rows])
    numbers = torch.stack(
        [filled([torch.full((len(p),), i + 1) for i, p in enumerate(row)]) for row in rows]
    )
    batch: dict[str, Any] = {"input_ids": ids, "position_ids": positions}
    mask = block_mask(numbers)
    if saying == "positions":
        return batch  # and transformers makes the mask from them
    batch["attention_mask"] = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(
        ~mask, torch.finfo(torch.float64).min
    )
    if saying == "bool_mask":
        batch["attention_mask"] = mask
    return batch


SAYING = pytest.mark.parametrize("saying", ["positions", "mask", "bool_mask"])
PARTS = {
    "token": {},
    "sequence": {"router_input": "sequence"},
    "sequence_max": {"router_input": "sequence", "router_input_kwargs": {"pool": "max"}},
    "sequence_first": {"router_input": "sequence", "router_input_kwargs": {"pool": "first"}},
    "sequence_last": {"router_input": "sequence", "router_input_kwargs": {"pool": "last"}},
    "prompt": {"router_input": "prompt"},
    "task": {"router_input": "task"},
    "capacity": {"router_modifiers": {"capacity": 1}},
    "capacity_factor": {"router_modifiers": {"capacity": {"factor": 0.5}}},
    "expert_choice": {"router": "expert_choice", "router_kwargs": {"capacity_factor": 1.0}},
    "layer": {"site": "layer", "router_input": "sequence", "num_experts": None, "top_k": 1},
    "block": {"site": "block", "router_input": "sequence", "target_modules": ["up_proj"]},
    "layerwise": {
        "site": "model", "site_kwargs": {"layerwise": True}, "router_input": "sequence",
    },
}  # fmt: skip
IDS = torch.tensor([2, 0, 1, 1, 2])  # one per document


def model_with(part: str) -> PeftModel:
    keys = {"router": "topk", **NEEDS.get(PARTS[part].get("router_input", ""), {}), **PARTS[part]}
    keys = {key: value for key, value in keys.items() if value is not None}
    return adapted_llama(**keys).double()


def alone(model: PeftModel, part: str, **keys: Any) -> list[torch.Tensor]:
    """The logits of each document by itself."""
    found, number = [], 0
    for row in documents():
        for piece in row:
            ids = {"task_id": IDS[number : number + 1]} if part == "task" else {}
            labels = {k: answered(piece[None]) for k in keys.get("labels", ())}
            out = model(input_ids=piece[None], use_cache=False, **ids, **labels)
            found.append(out.logits[0])
            number += 1
    return found


def ids_of_documents(model: PeftModel, batch: dict[str, Any]) -> torch.Tensor:
    """`IDS`, and 0 for what is padding: without a mask, further documents of one token each."""
    found = read_call(model.get_base_model(), (), batch, {}).documents
    assert found is not None
    numbers = found.of_T.view(len(LENGTHS), WIDTH)
    ids, taken = torch.zeros(found.count, dtype=torch.long), 0
    for row, lengths in zip(numbers, LENGTHS, strict=True):
        for place in range(sum(1 for length in lengths if length)):
            ids[row[0] + place] = IDS[taken]
            taken += 1
    return ids


def answered(ids: torch.Tensor) -> torch.Tensor:
    """Labels of a document whose first half, rounded up, is the prompt."""
    labels = ids.clone()
    labels[:, : (ids.shape[1] + 1) // 2] = -100
    return labels


def cut(logits: torch.Tensor) -> list[torch.Tensor]:
    found = []
    for row, lengths in zip(logits, LENGTHS, strict=True):
        found += [piece for piece in row.split([*lengths, WIDTH - sum(lengths)])[:-1] if len(piece)]
    return found


@SAYING
@pytest.mark.parametrize("part", PARTS)
def test_each_document_is_as_if_it_were_alone(part: str, saying: str) -> None:
    model = model_with(part)
    batch = packed(saying)
    if part == "task":
        batch["task_id"] = ids_of_documents(model, batch)
    with torch.no_grad():
        together = cut(model(**batch, use_cache=False).logits)
        for found, expected in zip(together, alone(model, part), strict=True):
            torch.testing.assert_close(found, expected, **NEAR)


def test_a_prompt_is_that_of_its_own_document() -> None:
    model = model_with("prompt").train()
    batch = packed("positions")
    rows = [filled([answered(p[None])[0] for p in row], -100) for row in documents()]
    together = cut(model(**batch, labels=torch.stack(rows), use_cache=False).logits)
    for found, expected in zip(together, alone(model, "prompt", labels=["labels"]), strict=True):
        torch.testing.assert_close(found, expected, **NEAR)


def test_training_on_packed_rows_gives_the_gradients_of_the_documents() -> None:
    gradients = []
    for pack in (True, False):
        model = model_with("sequence").train()
        if pack:
            logits = cut(model(**packed("positions"), use_cache=False).logits)
        else:
            logits = alone(model, "sequence")
        sum(piece.square().sum() for piece in logits).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    together, apart = gradients
    assert together.keys() == apart.keys() != set()
    for name, grad in apart.items():  # sums of squares of size 1e4: relative as well
        torch.testing.assert_close(together[name], grad, rtol=1e-9, atol=1e-9)


# What says where a document ends


def documents_of(**arguments: Any) -> list[list[int]] | None:
    shape = (1, 6)
    arguments = {"input_ids": torch.ones(shape, dtype=torch.long), **arguments}
    found = read_call(torch.nn.Identity(), (), arguments, {}).documents
    return None if found is None else found.of_T.view(arguments["input_ids"].shape).tolist()


def row(*numbers: int) -> torch.Tensor:
    return torch.tensor([numbers])


TWO = [[0, 0, 0, 0, 1, 1]]
THREE_PLANES = torch.stack([row(0, 1, 1, 2, 0, 1), row(0, 1, 2, 3, 0, 1), row(0, 1, 1, 2, 0, 1)])
IMAGE_FIRST = torch.stack([row(0, 0, 0, 0, 2, 3), row(0, 0, 1, 1, 2, 3), row(0, 1, 0, 1, 2, 3)])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"position_ids": row(0, 1, 2, 3, 0, 1)}, TWO),
        ({"position_ids": row(0, 0, 0, 1, 0, 1)}, [[0, 1, 2, 2, 3, 3]]),  # documents of one token
        ({"position_ids": row(5, 6, 7, 8, 3, 4)}, TWO),  # documents that were cut
        ({"position_ids": THREE_PLANES}, TWO),
        ({"position_ids": IMAGE_FIRST}, None),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 6], dtype=torch.int32)}, TWO),
        ({"cu_seq_lens_q": torch.tensor([0, 6], dtype=torch.int32)}, None),
        ({"seq_idx": row(0, 0, 0, 0, 1, 1).int()}, TWO),
        ({"attention_mask": row(1, 1, 1, 1, 2, 2)}, TWO),
        ({"attention_mask": row(1, 1, 1, 1, 2, 0)}, [[0, 0, 0, 0, 1, 1]]),
        # One sequence, however it is padded, positioned or masked.
        ({"position_ids": row(0, 1, 2, 3, 4, 5)}, None),
        ({"position_ids": row(7, 8, 9, 10, 11, 12)}, None),
        ({"attention_mask": row(0, 0, 1, 1, 1, 1), "position_ids": row(1, 1, 0, 1, 2, 3)}, None),
        ({"attention_mask": row(0, 0, 1, 1, 1, 1), "position_ids": row(0, 0, 0, 1, 2, 3)}, None),
        ({"attention_mask": row(1, 1, 1, 1, 0, 0), "position_ids": row(0, 1, 2, 3, 0, 0)}, None),
        ({"attention_mask": row(1, 1, 0, 0, 1, 1)}, None),  # a hole
        ({"attention_mask": torch.ones(6, 6).tril().bool()[None, None]}, None),
        ({"attention_mask": torch.ones(6, 6).bool()[None, None]}, None),
    ],
)
def test_where_a_document_ends(arguments: dict[str, Any], expected: list[list[int]] | None) -> None:
    assert documents_of(**arguments) == expected


# What goes with it


def test_an_id_for_each_document_or_one_for_all() -> None:
    model, batch = model_with("task"), packed("mask")
    count = len(ids_of_documents(model, batch))
    with torch.no_grad():
        one = model(**batch, task_id=1).logits
        each = model(**batch, task_id=torch.ones(count, dtype=torch.long)).logits
    assert torch.equal(one, each)
    for wrong in (2, count - 1):  # one per row, one too few
        with pytest.raises(ConfigError, match=rf"{wrong} ids for {count} sequences packed into 2"):
            model(**batch, task_id=torch.ones(wrong, dtype=torch.long))
    with pytest.raises(ConfigError, match="packed into 2"), routing_ids(model, task_id=[0, 1]):
        model(**batch)


@pytest.mark.parametrize("part", ["sequence", "prompt"])
def test_packed_rows_that_go_on_from_a_cache_are_refused(part: str) -> None:
    model, batch = model_with(part), packed("positions")
    with torch.no_grad():
        first = model(**batch, use_cache=True)
        with pytest.raises(ConfigError, match="packs"):
            model(**batch, **cache_of(first))


def test_losses_by_sequence_count_documents() -> None:
    """The same as for rows of one length, where that can be said in both ways."""
    torch.manual_seed(0)
    probs = torch.rand(8, 4).softmax(-1)
    routing, ids = Routing(probs, probs, probs), {"task_id": torch.tensor([1] * 4 + [0] * 4)}
    numbers = Documents(2, torch.tensor([0] * 4 + [1] * 4))
    for real in (None, torch.tensor([1, 1, 0, 0, 1, 1, 1, 1]).bool()):
        rows = localized_cv2(LossInput(routing, real, ids, batch=2))
        found = localized_cv2(LossInput(routing, real, ids, batch=1, documents=numbers))
        torch.testing.assert_close(found, rows)


def test_statistics_of_packed_rows_count_tokens() -> None:
    model, batch = model_with("sequence"), packed("mask")
    with torch.no_grad(), routing_statistics(model) as stats:
        model(**batch, use_cache=False)
    assert {counts.tokens for counts in stats.layers.values()} == {2 * WIDTH}
    assert len(stats.layers) == len(routed_layers(model))
