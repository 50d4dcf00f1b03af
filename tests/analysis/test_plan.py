"""What a plan says before anything has weights is what the real thing then has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from preset_cases import ATTENTION, SMALLER, adapted, base, config_of
from rich.console import Console
from tiny import tiny_llama
from torch import nn
from transformers import (
    CTRLConfig,
    Llama4TextConfig,
    MambaConfig,
    PhimoeConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from moelora_plugin import PRESETS, MoeLoraConfig, build_optimizer
from moelora_plugin.analysis.cost import StepCost, preconditioning_operations, step_cost
from moelora_plugin.analysis.plan import Step, adapt_empty, empty_base, plan_adapter
from moelora_plugin.analysis.plan_table import count, size
from moelora_plugin.checkpoint import WEIGHTS_FILE, save_adapter
from moelora_plugin.errors import ConfigError, MissingDependencyError
from moelora_plugin.model import moelora_layers
from moelora_plugin.types import ExpertPair

TOP_P = "mixlora_dynamic"  # the rows of its blocks depend on the data
MIXTURE: dict[str, Any] = {"r": 2, "num_experts": 4, "top_k": 2, "target_modules": ["q_proj"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base as a plan needs it: config.json and nothing else."""
    path = tmp_path_factory.mktemp("base")
    tiny_llama().config.save_pretrained(path)
    return str(path)


def preset_config(name: str) -> MoeLoraConfig:
    targets = PRESETS[name].overrides.get("target_modules", ATTENTION)
    return config_of(name, **{"target_modules": targets, **SMALLER.get(name, {})})


def trainable(model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {n: (tuple(p.shape), p.dtype) for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", PRESETS)
def test_what_trains_is_what_trains_of_the_real_model(name: str) -> None:
    planned = adapt_empty(base().config, preset_config(name), torch.float32)
    assert trainable(planned) == trainable(adapted(name))
    assert all(parameter.is_meta for parameter in planned.parameters())


@pytest.mark.parametrize("name", ["mixlora", "xlora", "poly", "milora_prompt", TOP_P])
def test_a_step_of_every_kind_of_site_is_counted(name: str) -> None:
    model = adapt_empty(base().config, preset_config(name), torch.float32)
    cost = step_cost(model, 2, 4, arguments=("task_id", "cluster_id"))
    assert (cost is None) == (name == TOP_P)
    if cost is not None:
        assert cost.peak_bytes > cost.saved_bytes > 0


def test_the_numbers_of_a_plan(folder: str, tmp_path: Path) -> None:
    config = MoeLoraConfig(**MIXTURE, modules_to_save=["lm_head"])
    plan = plan_adapter(folder, config, Step(batch=2, length=8), dtype="float32")
    model = get_peft_model(tiny_llama(), config)
    layers = moelora_layers(model).values()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.ours.trainable == parameters
    assert plan.base_parameters == sum(p.numel() for p in tiny_llama().parameters())
    assert plan.router_parameters == sum(p.numel() for m in layers for p in m.gate_parameters())
    experts = sum(p.numel() for m in layers for p in m.tensors().values())
    assert plan.expert_parameters == experts
    assert plan.ours.gradient_bytes == 4 * parameters
    assert plan.ours.weight_bytes == 4 * (plan.base_parameters + parameters)
    save_adapter(model, tmp_path / "adapter")
    written = (tmp_path / "adapter" / WEIGHTS_FILE).stat().st_size
    # The header: names, shapes and offsets, some 150 bytes for each of seven tensors.
    assert 0 < written - plan.ours.file_bytes < 2000
    (modules,) = plan.modules
    assert (modules.name, modules.count, modules.ranks, modules.top_k) == ("q_proj", 2, (2,) * 4, 2)
    assert (modules.in_features, modules.out_features) == (32, 32)
    # LoRA of rank 8 has what the experts have together.
    assert plan.lora.trainable == experts


@pytest.mark.parametrize(("name", "moments"), [("grsgd", 0), ("radamw", 2)])
def test_the_optimizer_s_state_is_that_of_the_optimizer(
    folder: str, name: str, moments: int
) -> None:
    config = MoeLoraConfig(**MIXTURE)
    plan = plan_adapter(folder, config, Step(name, 1, 4), dtype="float32")
    model = get_peft_model(tiny_llama(), config)
    optimizer = build_optimizer(model, name)
    model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    state = [t for values in optimizer.state.values() for t in values.values()]
    tensors = [t for t in state if isinstance(t, torch.Tensor) and t.ndim]  # without the step
    assert plan.ours.optimizer_bytes == sum(t.numel() * t.element_size() for t in tensors)
    assert plan.ours.optimizer_bytes == moments * plan.ours.gradient_bytes


def test_tied_weights_count_once() -> None:
    shape = tiny_llama().config
    untied = sum(p.numel() for p in empty_base(shape, torch.float32).parameters())
    shape.tie_word_embeddings = True
    tied = sum(p.numel() for p in empty_base(shape, torch.float32).parameters())
    assert untied - tied == shape.vocab_size * shape.hidden_size


def test_half_precision_is_that_of_the_real_model(folder: str) -> None:
    plan = plan_adapter(folder, MoeLoraConfig(**MIXTURE), Step(batch=1, length=4), dtype="bfloat16")
    real = get_peft_model(tiny_llama().to(torch.bfloat16), MoeLoraConfig(**MIXTURE))
    weights = sum(p.numel() * p.element_size() for p in real.parameters())
    assert plan.ours.weight_bytes == weights  # PEFT makes the adapter's own weights fp32
    assert plan.dtype == "bfloat16"


def kept(model: nn.Module, batch: int, length: int) -> int:
    """Bytes of a real step's saved tensors, each storage once, without weights."""
    weights = [*model.parameters()]
    own = {tensor.untyped_storage().data_ptr() for tensor in weights}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return tensor

    model.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_())
    ids = torch.zeros(batch, length, dtype=torch.long)
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, use_cache=False)
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_the_saved_tensors_of_a_real_step(
    dropout: float, dtype: torch.dtype
) -> None:
    config = MoeLoraConfig(target_modules=ATTENTION, lora_dropout=dropout)
    shape, batch, length = tiny_llama().config, 4, 32
    alone = tiny_llama().to(dtype).requires_grad_(False)
    real = kept(get_peft_model(tiny_llama().to(dtype), config), batch, length) - kept(
        alone, batch, length
    )
    empty = empty_base(shape, dtype).requires_grad_(False)
    ours = step_cost(adapt_empty(shape, config, dtype), batch, length)
    planned = ours.saved_bytes - step_cost(empty, batch, length).saved_bytes
    # Where the prompt ends is kept for the routers that ask: one byte a token, and the only thing
    # that a step of ours keeps without saving it for the backward.
    assert planned == real + batch * length


def test_operations_are_those_of_the_formulas(folder: str) -> None:
    """Forward 2 R (I + O) for LoRA and 2 E I for gates, twice that backward."""
    config = MoeLoraConfig(**{**MIXTURE, "target_modules": ATTENTION, "lora_dropout": 0.0})
    plan = plan_adapter(folder, config, Step(batch=2, length=8), dtype="float32")
    widths = [(m.count, m.in_features, m.out_features) for m in plan.modules]
    lora = sum(n * 2 * 8 * (i + o) for n, i, o in widths)
    gates = sum(n * 2 * 4 * i for n, i, _ in widths)
    steps = [use.step for use in (plan.alone, plan.lora, plan.ours)]
    forward = [step.forward // 16 for step in steps]
    assert forward == [forward[0], forward[0] + lora, forward[0] + lora + gates]
    total = [step.operations // 16 for step in steps]
    assert total == [total[0], total[0] + 3 * lora, total[0] + 3 * (lora + gates)]


def test_checkpointing_keeps_less_and_computes_more() -> None:
    config = MoeLoraConfig(**MIXTURE)
    shape = tiny_llama(layers=4).config

    def cost(**options: Any) -> StepCost:
        found = step_cost(adapt_empty(shape, config, torch.float32), 2, 64, **options)
        assert found is not None
        return found

    plain, again, mixed = cost(), cost(checkpointing=True), cost(autocast=torch.bfloat16)
    assert again.saved_bytes < plain.saved_bytes
    assert again.peak_bytes < plain.peak_bytes
    assert again.backward > plain.backward
    assert mixed.saved_bytes < plain.saved_bytes
    assert mixed.operations == plain.operations


def test_preconditioning() -> None:
    def pair(a: tuple[int, int], b: tuple[int, int], *ranks: int, **kwargs: Any) -> ExpertPair:
        return ExpertPair(
            nn.Parameter(torch.empty(a)), nn.Parameter(torch.empty(b)), ranks, 1.0, **kwargs
        )

    # Gram matrices and products with the gradients, 2 r^2 (I + O) each; 2 r^3 for both inverses.
    assert preconditioning_operations([pair((2, 10), (6, 2), 2)]) == 2 * 2 * 4 * 16 + 2 * 8
    two = pair((3, 10), (6, 3), 1, 2)
    assert preconditioning_operations([two]) == 2 * 2 * 5 * 16 + 2 * 9
    # One A and three B: each of their 16 r^2-fold entries once, and one inverse for each side.
    shared = pair((2, 10), (6, 6), 2, 2, 2, shared="a")
    assert preconditioning_operations([shared]) == 2 * 2 * 2 * (20 + 36) + 2 * 8
    frozen = ExpertPair(torch.empty(2, 10), nn.Parameter(torch.empty(6, 2)), (2,), 1.0)
    assert preconditioning_operations([frozen]) == 2 * 4 * 16 + 8
    assert preconditioning_operations([]) == 0


def shown(plan: Any, width: int) -> str:
    console = Console(width=width, record=True)
    console.print(plan.table())
    return console.export_text()


def test_the_table(folder: str) -> None:
    config = config_of("mola", target_modules=["q_proj", "v_proj"])
    config.allocation_kwargs = {"num_experts": [2, 8]}
    text = shown(plan_adapter(folder, config, Step(batch=2, length=8), dtype="float32"), 80)
    assert max(map(len, text.splitlines())) <= 80
    for part in (
        folder[-20:],
        "2 x 8 = 16 tokens",
        "q_proj, v_proj",
        "relative to LoRA",
        "1.000 x",
    ):
        assert part in text.replace("\n", "")
    plan = plan_adapter(folder, preset_config(TOP_P), Step(batch=2, length=8), dtype="float32")
    assert "depends on the data" in shown(plan, 120)
    assert plan.added_activation_bytes is None


def test_units() -> None:
    assert [size(n) for n in (0, 1023, 1024, 1.5 * 2**30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 GiB",
    ]
    assert [count(n) for n in (999, 1000, 2.5e9)] == ["999", "1.0 K", "2.5 G"]


def test_a_base_that_is_none(folder: str, tmp_path: Path) -> None:
    config = MoeLoraConfig(**MIXTURE)
    with pytest.raises(
        MissingDependencyError, match=r"is not a folder and cannot be had from the hub.*--model"
    ):
        plan_adapter("nowhere/nothing", config)
    with pytest.raises(ConfigError, match=r"Cannot load a model from .*--model"):
        plan_adapter(str(tmp_path), config)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ConfigError, match="'vit' is no causal language model"):
        plan_adapter(str(tmp_path), config)
    with pytest.raises(ConfigError, match="matches no module"):
        plan_adapter(folder, MoeLoraConfig(target_modules=["nothing"]))


def test_lora_stands_for_each_module_s_total_rank(folder: str) -> None:
    config = MoeLoraConfig(
        **MIXTURE, allocation="layers", allocation_kwargs={"r": [1, 3]}, lora_alpha=4
    )
    plan = plan_adapter(folder, config, Step(batch=1, length=4), dtype="float32")
    lora = LoraConfig(
        r=4, rank_pattern={"layers.1.self_attn.q_proj": 12}, target_modules=["q_proj"]
    )
    real: PeftModel = get_peft_model(tiny_llama(), lora)
    assert plan.lora.trainable == real.get_nb_trainable_parameters()[0]


SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MOE: dict[str, Any] = {**SMALL, "moe_intermediate_size": 12}


@pytest.mark.parametrize(
    ("shape", "note"),
    [
        (Qwen3MoeConfig(**MOE, num_experts=4, num_experts_per_tok=2, head_dim=4), "the experts"),
        # PEFT takes names of the shared expert for those of the fused ones.
        (
            Qwen2MoeConfig(
                **MOE, num_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=8
            ),
            "the experts",
        ),
        (PhimoeConfig(**SMALL, num_local_experts=4), "mlp.router"),
        (
            Llama4TextConfig(
                **SMALL, head_dim=4, intermediate_size_mlp=24, num_local_experts=4, pad_token_id=0
            ),
            "feed_forward.router",
        ),
        (MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4), "dt_proj"),
        # Changes its embeddings in place.
        (CTRLConfig(vocab_size=40, n_embd=16, dff=24, n_layer=2, n_head=4), None),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bases_with_ways_of_their_own(
    shape: PretrainedConfig, note: str | None, dtype: str, tmp_path: Path
) -> None:
    shape.save_pretrained(tmp_path)
    config = MoeLoraConfig(r=2, num_experts=4, top_k=2, target_modules="all-linear")
    plan = plan_adapter(str(tmp_path), config, Step(batch=2, length=8), dtype=dtype)
    steps = [use.step for use in (plan.alone, plan.lora, plan.ours)]
    assert all(step is not None for step in steps)
    assert steps[0].operations < steps[1].operations < steps[2].operations
    # LoRA stands on the same linears, and on nothing else.
    assert plan.lora.trainable == plan.expert_parameters
    assert [note in text for text in plan.notes] == ([] if note is None else [True])
    assert all(text in shown(plan, 400) for text in plan.notes)


def test_fused_experts_are_counted_by_their_tokens(tmp_path: Path) -> None:
    forward = []
    for selected in (1, 2):
        shape = Qwen3MoeConfig(**MOE, num_experts=4, num_experts_per_tok=selected, head_dim=4)
        shape.save_pretrained(tmp_path)
        config = MoeLoraConfig(**{**MIXTURE, "target_modules": ["q_proj"]})
        plan = plan_adapter(str(tmp_path), config, Step(batch=2, length=8), dtype="float32")
        assert plan.alone.step is not None
        forward.append(plan.alone.step.forward)
    # Gate and up together, then down, of two layers, for each of 16 tokens.
    assert forward[1] - forward[0] == 16 * 2 * 2 * (16 * 24 + 12 * 16)


def test_a_base_that_cannot_be_counted_or_built_is_refused_in_a_sentence(tmp_path: Path) -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = nn.Embedding(4, 4)

        def get_input_embeddings(self) -> nn.Module:
            return self.embeddings

        def forward(self, input_ids: torch.Tensor, labels: Any, use_cache: bool) -> torch.Tensor:
            raise ValueError("You have to specify pixel_values.\nOr else.")

    with torch.device("meta"):
        model = Picky()
    with pytest.raises(ConfigError, match=r"ValueError: You have to specify pixel_values\); plan"):
        step_cost(model, 1, 2)
    shape = Qwen3MoeConfig(**MOE, num_experts=4, layer_types=["full_attention"] * 2)
    shape.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"hidden_size": 16', '"hidden_size": -16'))
    with pytest.raises(ConfigError, match=r"'qwen3_moe' cannot be built from its configuration"):
        plan_adapter(str(tmp_path), MoeLoraConfig(**MIXTURE), dtype="float32")


def test_a_plan_judges_names_as_a_training_does(tmp_path: Path) -> None:
    Qwen3MoeConfig(**MOE, num_experts=4, head_dim=4).save_pretrained(tmp_path)
    config = MoeLoraConfig(target_modules=["q_proj", "gate_proj"])
    with pytest.raises(ConfigError, match="names gate_proj, which matches no module"):
        plan_adapter(str(tmp_path), config, Step(batch=2, length=8), dtype="float32")
