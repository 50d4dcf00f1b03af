"""How experts and ranks are spread over the modules."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import tiny_llama

from moelora_plugin import MoeLoraConfig
from moelora_plugin.allocation import ALLOCATIONS
from moelora_plugin.errors import ConfigError
from moelora_plugin.model import moelora_layers
from moelora_plugin.types import LayerPlan, Place


def config_for(**keys) -> MoeLoraConfig:
    defaults = {"num_experts": 5, "top_k": 2, "r": 8, "lora_alpha": 16}
    return MoeLoraConfig(**{**defaults, **keys})


def plans(name: str, num_layers: int, config: MoeLoraConfig | None = None, **options):
    return [
        ALLOCATIONS[name](
            config or config_for(),
            Place(f"model.layers.{i}.self_attn.q_proj", i, num_layers),
            **options,
        )
        for i in range(num_layers)
    ]


def counts(num_layers, distribution, **keys):
    found = plans("layers", num_layers, config_for(**keys), num_experts=distribution)
    return [plan.num_experts for plan in found]


@pytest.mark.parametrize("written", [[2, 4, 6, 8], (2, 4, 6, 8), "2-4-6-8"])
def test_four_numbers_over_32_layers_are_mola_s_eight_layers_each(written):
    assert counts(32, written) == [2] * 8 + [4] * 8 + [6] * 8 + [8] * 8


def test_layers_that_do_not_divide_go_to_the_floor_rule():
    assert counts(30, "2-4-6-8") == [2] * 8 + [4] * 7 + [6] * 8 + [8] * 7
    assert counts(6, "2-4-6-8") == [2, 2, 4, 6, 6, 8]
    assert counts(3, "2-4-6") == [2, 4, 6]
    assert counts(4, 3) == [3] * 4


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ("triangle", (8, 6, 4, 2)),
        ("inverted_triangle", (2, 4, 6, 8)),
        ("hourglass", (8, 2, 2, 8)),
        ("rectangle", (5, 5, 5, 5)),
    ],
)
def test_mola_s_shapes_by_name(shape, groups):
    assert counts(32, shape) == [n for n in groups for _ in range(8)]


@pytest.mark.parametrize("shape", ["triangle", "inverted_triangle", "hourglass", "rectangle"])
@pytest.mark.parametrize("mean", range(3, 23))
def test_a_shape_keeps_the_total(shape, mean):
    found = counts(8, shape, num_experts=mean, top_k=1)
    assert sum(found) == 8 * mean
    assert min(found) >= 1


def test_hilo_changes_experts_and_ranks_together():
    found = plans("layers", 4, num_experts="2-4-6-8", r="8-6-4-2", top_k=2, alpha=[16, 8, 4, 2])
    assert found == [
        LayerPlan(2, 2, (8,) * 2, 16),
        LayerPlan(4, 2, (6,) * 4, 8),
        LayerPlan(6, 2, (4,) * 6, 4),
        LayerPlan(8, 2, (2,) * 8, 2),
    ]


def test_an_entry_of_r_may_be_one_rank_per_expert():
    found = plans("layers", 2, num_experts=[2, 3], r=[[1, 5], 4])
    assert [plan.ranks for plan in found] == [(1, 5), (4, 4, 4)]
    assert found[0].scaling() == 16 / 3  # alpha over the mean rank


def test_a_total_rank_is_split_or_summed():
    options = {"num_experts": [2, 3]}
    as_here = {"allocation": "layers", "allocation_kwargs": options}  # 12 is no multiple of 5
    config = config_for(total_rank=True, r=12, top_k=1, **as_here)
    found = plans("layers", 2, config, **options)
    assert [plan.ranks for plan in found] == [(6, 6), (4, 4, 4)]
    assert [plan.scaling() for plan in found] == [16 / 12] * 2
    options = {"num_experts": 2, "r": [[3, 5]]}
    as_here = {"allocation": "layers", "allocation_kwargs": options}
    (plan,) = plans("layers", 1, config_for(total_rank=True, **as_here), **options)
    assert plan.scaling() == 16 / 8


def test_a_module_outside_of_the_layers_keeps_the_configuration_s_numbers():
    plan = ALLOCATIONS["layers"](config_for(), Place("lm_head"), num_experts="2-4-6-8", r=[1, 2])
    assert plan == LayerPlan(5, 2, (8,) * 5, 16)


def test_pattern_takes_the_first_match_per_number():
    options = {
        "num_experts": {"layers[.]0[.].*": 3, "q_proj": 4},
        "r": {"q_proj": [2, 4, 6], "proj": 1},
        "alpha": {"nothing": 1.0},
    }
    place = Place("model.layers.0.self_attn.q_proj", 0, 2)
    assert ALLOCATIONS["pattern"](config_for(), place, **options) == LayerPlan(3, 2, (2, 4, 6), 16)
    place = Place("model.layers.1.mlp.up_proj", 1, 2)  # "proj" is no whole part of its name
    assert ALLOCATIONS["pattern"](config_for(), place, **options) == LayerPlan(5, 2, (8,) * 5, 16)


ENTRIES = {
    "model.layers.0.self_attn.q_proj": {"num_experts": 2, "top_k": 1, "ranks": [1, 4], "alpha": 3},
    "q_proj": {"ranks": [2, 2, 5]},
    "base_model.model.model.layers.0.self_attn.v_proj": {"num_experts": 3, "ranks": 7},
}


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("model.layers.0.self_attn.q_proj", LayerPlan(2, 1, (1, 4), 3)),
        ("wrapper.model.layers.0.self_attn.q_proj", LayerPlan(2, 1, (1, 4), 3)),
        ("model.layers.1.self_attn.q_proj", LayerPlan(3, 2, (2, 2, 5), 16)),
        ("model.layers.0.self_attn.v_proj", LayerPlan(3, 2, (7, 7, 7), 16)),
    ],
)
def test_modules_by_the_longest_suffix(name, plan):
    place = Place(name, 0, 2)
    assert ALLOCATIONS["modules"](config_for(), place, modules=ENTRIES) == plan


def test_modules_without_an_entry_are_an_error():
    with pytest.raises(ConfigError, match=r"no entry for model\.layers\.0\.mlp\.xq_proj; add one"):
        ALLOCATIONS["modules"](config_for(), Place("model.layers.0.mlp.xq_proj"), modules=ENTRIES)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("layers", {"num_experts": []}, r"allocation_kwargs\['num_experts'\] must not be an empty"),
        ("layers", {"num_experts": [2] * 5}, "has 5 entries for 4 layers"),
        ("layers", {"num_experts": "triangel"}, "did you mean 'triangle'"),
        ("layers", {"r": "triangle"}, r"allocation_kwargs\['r'\]='triangle' must be a number, a l"),
        ("layers", {"num_experts": [0]}, r"\['num_experts'\]=0 must be an integer of at least 1"),
        ("layers", {"top_k": True}, r"\['top_k'\]=True must be an integer"),
        ("layers", {"r": [[1, 0, 1, 1, 1]]}, r"\['r'\]=\[1, 0, 1, 1, 1\] must be integers"),
        ("layers", {"r": [[1, 2]]}, "must hold one rank for each of 5 experts"),
        ("layers", {"alpha": [-1.0]}, r"\['alpha'\]=-1.0 must be a positive number"),
        ("layers", {"top_k": 6}, "top_k=6 is more than num_experts=5"),
        ("pattern", {"r": 3}, r"\['r'\]=3 must map patterns to values"),
        ("pattern", {"r": {"(": 3}}, r"pattern '\(', which is no regular expression"),
        ("pattern", {"r": {"q_proj": "3"}}, r"\['r'\]='3' must be an integer"),
        ("modules", {}, r"allocation='modules' needs allocation_kwargs"),
        ("modules", {"modules": {"q_proj": 3}}, r"\['q_proj'\]=3 must map num_experts, top_k, "),
        ("modules", {"modules": {"q_proj": {"rank": 3}}}, "did you mean 'ranks'"),
        ("modules", {"modules": {"q_proj": {"ranks": [3]}}}, "top_k=2 is more than num_experts=1"),
    ],
)
def test_errors_name_the_key(name, options, message):
    with pytest.raises(ConfigError, match=message):
        plans(name, 4, **options)


def test_a_shape_that_leaves_layers_without_experts_is_refused():
    with pytest.raises(ConfigError, match="num_experts=1 is too few for this shape"):
        counts(4, "triangle", num_experts=1, top_k=1)


# In a model ---------------------------------------------------------------------------------------


def adapted(**keys):
    config = config_for(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **keys)
    return get_peft_model(tiny_llama(vocab_size=64, layers=4), config)


def shapes(model):
    return {
        name.removeprefix("base_model.model."): (
            layer.moelora_mixture["default"].plan.num_experts,
            layer.moelora_mixture["default"].plan.ranks,
        )
        for name, layer in moelora_layers(model).items()
    }


def one_step(model):
    inputs = torch.arange(12).view(2, 6)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(input_ids=inputs, labels=inputs).loss.backward()
    optimizer.step()


def test_an_allocation_from_a_file_trains_and_loads_without_the_file(tmp_path):
    names = [
        f"model.layers.{i}.{part}"
        for i in range(4)
        for part in ("self_attn.q_proj", "mlp.down_proj")
    ]
    content = {
        name: {
            "num_experts": 2 + i % 3,
            "top_k": 2,
            "ranks": [1 + (i + e) % 4 for e in range(2 + i % 3)],
        }
        for i, name in enumerate(names)
    }
    path = tmp_path / "alloc.json"
    path.write_text(json.dumps(content))
    model = adapted(allocation="modules", allocation_kwargs={"path": str(path)})
    path.unlink()
    expected = {name: (e["num_experts"], tuple(e["ranks"])) for name, e in content.items()}
    assert shapes(model) == expected

    one_step(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_llama(vocab_size=64, layers=4), tmp_path / "adapter")
    assert shapes(loaded) == expected
    assert loaded.peft_config["default"].allocation_kwargs == {"modules": content}
    inputs = torch.arange(12).view(2, 6)
    assert torch.equal(model.eval()(inputs).logits, loaded.eval()(inputs).logits)


def test_layers_and_patterns_train():
    model = adapted(allocation="layers", allocation_kwargs={"num_experts": "2-4", "r": "1-3"})
    assert shapes(model)["model.layers.1.mlp.down_proj"] == (2, (1, 1))
    assert shapes(model)["model.layers.2.mlp.down_proj"] == (4, (3,) * 4)
    one_step(model)
    model = adapted(allocation="pattern", allocation_kwargs={"r": {"q_proj": [1, 2, 3, 4, 5]}})
    assert shapes(model)["model.layers.0.self_attn.q_proj"] == (5, (1, 2, 3, 4, 5))
    assert shapes(model)["model.layers.0.mlp.down_proj"] == (5, (8,) * 5)
    one_step(model)


@pytest.mark.parametrize("content", [None, "{"])
def test_a_file_that_cannot_be_read_is_an_error_when_the_config_is_made(tmp_path, content):
    path = tmp_path / "alloc.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(
        ConfigError,
        match=r"allocation_kwargs\['path'\]=.*alloc\.json' (is not valid JSON|cannot be read)",
    ):
        config_for(allocation="modules", allocation_kwargs={"path": str(path)})
