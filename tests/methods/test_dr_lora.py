"""DR-LoRA on bases that are themselves mixtures: what grows, when, and that nothing else moves."""

from __future__ import annotations

import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import enable_checkpointing
from torch import nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from moelora_plugin import MoeLoraConfig, build_optimizer
from moelora_plugin.errors import ConfigError
from moelora_plugin.model import moelora_layers
from moelora_plugin.optim.rank_growth import RankGrowth

LARGEST, FIRST, TARGET = 4, 1, 2
GROWTH = {"init_rank": FIRST, "target_rank": TARGET, "interval": 2, "until": 1.0}


def mixtral() -> nn.Module:
    """Experts fused into 3-D parameters; the router prefers some of them."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.3,
        pad_token_id=0,
    )
    return MixtralForCausalLM(config)


def fused() -> nn.Module:
    """PEFT's LoRA on them."""
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=LARGEST, lora_alpha=8, target_modules=[], target_parameters=targets)
    return get_peft_model(mixtral(), config)


class TinyExpert(nn.Module):
    """An expert of linears."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class TinyMixture(nn.Module):
    """Experts as modules, the top one of four for each token, as remote code often has them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4, bias=False)
        self.experts = nn.ModuleList(TinyExpert() for _ in range(4))

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights, ids = self.gate(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            chosen = ids == number
            if chosen.any():
                out[chosen] = expert(flat[chosen]) * weights[chosen, None]
        return x + out.view_as(x)


class TinyModel(nn.Module):
    """Two such layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = PreTrainedConfig()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": TinyMixture()}) for _ in range(2))
        self.head = nn.Linear(8, 20)

    def forward(self, input_ids, labels=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer["mlp"](x)
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


def modules() -> nn.Module:
    """One LoRA of ours on each."""
    config = MoeLoraConfig(
        num_experts=1, top_k=1, r=LARGEST, lora_dropout=0.0, target_modules=["up", "down"]
    )
    return get_peft_model(TinyModel(), config)


def switch() -> nn.Module:
    """The experts of transformers that still are modules."""
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=20,
        d_model=8,
        d_kv=4,
        d_ff=12,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_heads=2,
        num_experts=4,
        expert_capacity=64,
        decoder_start_token_id=0,
    )
    base = SwitchTransformersForConditionalGeneration(config)
    adapter = MoeLoraConfig(
        num_experts=1,
        top_k=1,
        r=LARGEST,
        lora_dropout=0.0,
        target_modules=r".*\.experts\..*\.(wi|wo)",
    )
    return get_peft_model(base, adapter)


BASES = {"fused": fused, "modules": modules, "switch": switch}
OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
    ),
    "gradamw": lambda model: build_optimizer(model, "gradamw", lr=1e-2, weight_decay=0.1),
}


def rows(seed: int = 0, size: int = 40) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, min(size, 20), (8, 10), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def train(model, folder, callback, steps=8, optimizer=None, resume=None) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        save_steps=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        restore_callback_states_from_checkpoint=True,
    )
    made = (None, None) if optimizer is None else (OPTIMIZERS[optimizer](model), None)
    trainer = Trainer(model, arguments, train_dataset=rows(), callbacks=[callback], optimizers=made)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def pairs(model) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(experts, rank, in) and (experts, rank, out) of each adapted weight."""
    found = {}
    for name, layer in moelora_layers(model).items():
        tensors = layer.tensors()
        found[name] = tensors["A"].detach()[None], tensors["B"].detach().T[None]
    for name, module in model.named_modules():
        if hasattr(module, "parameter_name"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            count = module.num_experts
            # PEFT's layout: A holds an expert's ranks side by side, B a rank's experts.
            b_OrE = b.detach().view(len(b), LARGEST, count)
            found[name] = a.detach().view(count, LARGEST, -1), b_OrE.permute(2, 1, 0)
    return found


@pytest.mark.parametrize("base", BASES)
def test_ranks_grow_to_the_budget_where_they_are_used(base, tmp_path):
    model, growth = BASES[base](), RankGrowth(**GROWTH)
    train(model, tmp_path, growth)
    ranks = growth.ranks()
    assert len(ranks) == 2
    for name, counts in ranks.items():
        assert sum(counts) == TARGET * 4
        assert max(counts) <= LARGEST
        assert min(counts) >= FIRST
        assert len(set(counts)) > 1, "the base's router does not use its experts evenly"
        # A share at each update, averaged from zero over eight.
        assert sum(growth.frequency[name]) == pytest.approx(1 - 0.9**8)
    for name, counts in ranks.items():
        # Every weight of an expert has the expert's rank; a fused one has those of all experts.
        inside = {key: a for key, (a, _) in pairs(model).items() if name in key}
        assert len(inside) == (2 if base == "fused" else 8)
        for key, a in inside.items():
            digits = re.search(r"experts\.(?:expert_)?(\d+)", key)
            expected = counts if digits is None else [counts[int(digits[1])]]
            assert a.ne(0).any(-1).sum(-1).tolist() == expected
            drawn = a[a.ne(0).any(-1)]
            assert len(drawn.unique(dim=0)) == len(drawn), "no two ranks start the same"


@pytest.mark.parametrize(
    ("base", "optimizer"),
    # Our optimizers take our adapter's pairs, which fused experts do not have.
    [("fused", "adamw"), *((base, name) for base in ("modules", "switch") for name in OPTIMIZERS)],
)
def test_what_is_not_active_stays_zero_and_what_is_trains(base, optimizer, tmp_path):
    model = BASES[base]()
    growth = RankGrowth(**{**GROWTH, "interval": 100})
    train(model, tmp_path, growth, steps=4, optimizer=optimizer)
    trained = 0
    for a, b in pairs(model).values():
        assert a[:, FIRST:].abs().max() == b[:, FIRST:].abs().max() == 0
        assert a[:, :FIRST].abs().min() > 0
        trained += int(b[:, :FIRST].abs().amax((1, 2)).gt(0).sum())
    # Experts that no token reaches do not move.
    reached = sum(f > 0 for layer in growth.frequency.values() for f in layer)
    assert trained >= reached > 4


@pytest.mark.parametrize("base", BASES)
def test_growing_changes_no_output_until_it_trains(base):
    model, growth = BASES[base](), RankGrowth(**GROWTH)
    batch = {"input_ids": torch.tensor(rows()["input_ids"][:4])}
    batch["labels"] = batch["input_ids"]
    growth.attach(model)
    growth.shrink()
    model.train()
    torch.manual_seed(0)
    before = model(**batch)
    before["loss"].backward()
    growth.observe()
    growth.grow(2, growths_left=2)  # four ranks are missing, half of them now
    assert all(sum(counts) == 6 for counts in growth.ranks().values())
    growth.grow(4, growths_left=1)
    started = [a[:, FIRST:].flatten(0, 1)[:, 0] for a, _ in pairs(model).values()]
    first_weights = torch.cat(started)
    first_weights = first_weights[first_weights != 0]
    assert len(first_weights.unique()) == len(first_weights), "two growths drew the same"
    torch.manual_seed(0)
    assert torch.equal(model(**batch)["logits"], before["logits"])
    assert all(sum(counts) == TARGET * 4 for counts in growth.ranks().values())
    growth.detach()


def test_the_views_are_the_experts_own_loras():
    """Against what PEFT adds to each expert's weight; then what shrinking leaves of it."""
    model, growth = fused(), RankGrowth(**GROWTH)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    growth.attach(model)
    wrappers = {
        id(module.lora_A["default"].weight): module
        for module in model.modules()
        if hasattr(module, "parameter_name")
    }

    def check(rank: int) -> None:
        seen = 0
        for layer in growth._layers.values():
            for expert, factors in layer.experts.items():
                for f in factors:
                    wrapper = wrappers[id(f.a)]
                    a, b = f.rows(f.a.detach())[:rank], f.columns(f.b.detach())[:, :rank]
                    delta = wrapper.get_delta_weight("default")[expert]
                    torch.testing.assert_close(b @ a * wrapper.scaling["default"], delta)
                    seen += 1
        assert seen == 2 * 4 * 2

    check(LARGEST)
    growth.shrink()
    check(FIRST)
    assert all(b[:, FIRST:].abs().max() == 0 for _, b in pairs(model).values())
    growth.detach()


def test_counts_are_the_router_s_choices_without_padding():
    model, growth = fused(), RankGrowth(**GROWTH)
    growth.attach(model)
    model.train()
    ids = torch.tensor(rows()["input_ids"][:2])
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    out = model(input_ids=ids, attention_mask=mask, output_router_logits=True)
    for layer, logits in zip(growth._layers.values(), out.router_logits, strict=True):
        chosen = logits.topk(2).indices[mask.flatten().bool()].flatten()
        expected = chosen.bincount(minlength=4).tolist()
        assert [layer.counts.get(i, 0) for i in range(4)] == expected
        layer.counts.clear()
    model.eval()
    model(input_ids=ids)
    with torch.no_grad():
        model.train()(input_ids=ids)
    assert not any(layer.counts for layer in growth._layers.values())
    growth.detach()
    model(input_ids=ids)
    assert not any(layer.counts for layer in growth._layers.values())


def test_counts_of_experts_that_are_modules():
    model, growth = modules(), RankGrowth(**GROWTH)
    growth.attach(model)
    ids = torch.tensor(rows()["input_ids"][:2])
    seen = []
    for layer in model.get_base_model().layers:
        layer["mlp"].gate.register_forward_hook(lambda *call: seen.append(call[-1].argmax(-1)))
    model.train()
    model(input_ids=ids)
    for layer, chosen in zip(growth._layers.values(), seen, strict=True):
        expected = chosen.bincount(minlength=4).tolist()
        assert [layer.counts.get(i, 0) for i in range(4)] == expected
        layer.counts.clear()
    with torch.no_grad():
        model(input_ids=ids)
    model.eval()(input_ids=ids)
    assert not any(layer.counts for layer in growth._layers.values())
    growth.detach()


def test_saliency_and_growth_by_hand():
    """Two updates of one layer with four experts, from the formulas."""
    model, growth = modules(), RankGrowth(init_rank=1, target_rank=1.75, interval=1, beta=0.5)
    growth.attach(model)
    growth.shrink()
    layer = growth._layers["layers.0.mlp.experts"]
    for update, counts in enumerate(([6, 2, 0, 0], [4, 0, 4, 0])):
        layer.counts.update(enumerate(counts))
        for expert, factors in layer.experts.items():
            for f in factors:
                with torch.no_grad():
                    f.rows(f.a)[0] = 1.0
                f.a.grad, f.b.grad = torch.full_like(f.a, expert + 1.0), torch.zeros_like(f.b)
        for other in growth._layers["layers.1.mlp.experts"].experts.values():
            for f in other:
                f.a.grad, f.b.grad = torch.zeros_like(f.a), torch.zeros_like(f.b)
        growth.observe()
        assert not layer.counts, update
    name = "layers.0.mlp.experts"
    # 0.5 * (0.5 * [0.75, 0.25, 0, 0]) + 0.5 * [0.5, 0, 0.5, 0]; weight 1 times gradient i + 1.
    assert growth.frequency[name] == pytest.approx([0.4375, 0.0625, 0.25, 0.0])
    assert growth.importance[name] == pytest.approx([0.75, 1.5, 2.25, 3.0])
    # saliency [.328, .094, .5625, 0], divided by rank + 1, for three ranks: expert 2 at .281, 2 at
    # .1875, 0 at .164 (before 2 at .141).
    growth.grow(1, growths_left=1)
    assert growth.ranks()[name] == [2, 1, 3, 1]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole = RankGrowth(**GROWTH)
    train(modules(), tmp_path / "whole", whole)
    trainer = train(
        modules(),
        tmp_path / "resumed",
        RankGrowth(**GROWTH),
        resume=str(tmp_path / "whole" / "checkpoint-4"),
    )
    resumed = next(c for c in trainer.callback_handler.callbacks if isinstance(c, RankGrowth))
    assert (resumed.frequency, resumed.ranks()) == (whole.frequency, whole.ranks())
    files = [
        load_file(tmp_path / run / "checkpoint-8" / "adapter_model.safetensors")
        for run in ("whole", "resumed")
    ]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_checkpointing_grows_the_same(tmp_path):
    plain, recomputed = RankGrowth(**GROWTH), RankGrowth(**GROWTH)
    train(fused(), tmp_path / "a", plain)
    model = fused()
    enable_checkpointing(model)
    train(model, tmp_path / "b", recomputed)
    assert recomputed.ranks() == plain.ranks()
    for name, shares in plain.frequency.items():
        # The same counts, twice each: a share is a quotient of small integers.
        assert recomputed.frequency[name] == pytest.approx(shares)


def test_what_cannot_grow_says_so_in_a_sentence():
    for changes, named in (
        ({"init_rank": 0}, "init_rank=0"),
        ({"init_rank": 3}, "target_rank=2"),
        ({"interval": 0}, "interval=0"),
        ({"until": 0.0}, "until=0.0"),
        ({"beta": 1.0}, "beta=1.0"),
        ({"penalty": -1.0}, "penalty=-1.0"),
    ):
        with pytest.raises(ConfigError, match=named):
            RankGrowth(**{**GROWTH, **changes})
    with pytest.raises(ConfigError, match="more than the adapter's r=4; raise r"):
        RankGrowth(**{**GROWTH, "target_rank": 5}).attach(modules())
    several = MoeLoraConfig(num_experts=2, top_k=1, target_modules=["up"])
    with pytest.raises(ConfigError, match="set num_experts and top_k to 1"):
        RankGrowth(**GROWTH).attach(get_peft_model(TinyModel(), several))
    attention = LoraConfig(r=4, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="no LoRA on an expert of the base"):
        RankGrowth(**GROWTH).attach(get_peft_model(mixtral(), attention))
