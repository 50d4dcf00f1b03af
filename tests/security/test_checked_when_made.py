"""A configuration is checked when it is made: every name, every option, before there is a base."""

from __future__ import annotations

import inspect

import pytest
import torch
import yaml
from typer.testing import CliRunner

from moelora_cli.main import app
from moelora_plugin import PRESETS, MoeLoraConfig, families
from moelora_plugin.errors import ConfigError
from moelora_plugin.families import FAMILIES
from moelora_plugin.integrations.options import adapter_config
from moelora_plugin.lookup import _options
from moelora_plugin.routers import TopKRouter
from moelora_plugin.values import fits

KEYED = [kind for kind in FAMILIES.values() if kind.key]
PARTS = [(kind, name) for kind in KEYED for name in kind.built_in()]
# What a part needs of the rest of the configuration, or of its own options, to be there at all.
NEEDS = {
    "hard": {"top_k": 1},
    "rank": {"r": 1},
    "pools": {"r": 1},
    "self_rank": {"r": 1},
    "task": {"router_score": "embedding"},
    "cluster": {"router_score": "embedding"},
    "none": {"router_score": "static"},
    "assigned": {"router_input": "task"},
    "embedding": {"router_input": "task"},
    "lambda_sparsity": {"router": "sparsegen"},
    "modules": {"allocation_kwargs": {"modules": {"q_proj": {"ranks": 2}}}},
    "adapters": {"init_kwargs": {"paths": ["a"] * 20}},
}


def with_part(kind, name: str, options: dict) -> dict:
    """The fields of a configuration that names a part, with options."""
    needs = dict(NEEDS.get(name, {}))
    if kind.key == "aux_losses":
        return {**needs, "aux_losses": {name: {"coefficient": 0.1, **options}}}
    if kind.key == "router_modifiers":
        example = kind.built_in()[name].example
        return {**needs, "router_modifiers": {name: options or example}}
    fields = {**needs, kind.key: name}
    if kind.options:
        fields[kind.options] = {**needs.get(kind.options, {}), **options}
    return fields


def options_of(part) -> list[str]:
    parameters = inspect.signature(part).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


OPTIONS = [
    (kind, name, option)
    for kind, name in PARTS
    for option in options_of(kind.built_in()[name])
    if kind.key != "router_modifiers"
]


@pytest.mark.parametrize(("kind", "name"), PARTS, ids=lambda x: getattr(x, "name", x))
def test_every_part_is_taken_by_its_name(kind, name):
    state = torch.get_rng_state()
    MoeLoraConfig(**with_part(kind, name, {}))
    assert torch.equal(state, torch.get_rng_state()), "a check must not draw random numbers"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_presets_options_are_taken(preset):
    """Without what only the user can give, which `tests/methods/test_presets.py` adds."""
    fields = PRESETS[preset].overrides
    if not PRESETS[preset].needs:
        MoeLoraConfig.from_preset(preset)
        MoeLoraConfig(**fields, peft_type="MOELORA")


@pytest.mark.parametrize("kind", KEYED, ids=lambda kind: kind.name)
def test_a_misspelt_name_of_any_family_offers_the_nearest(kind):
    for name in kind.built_in():
        misspelt = f"{name}x"
        fields = with_part(kind, name, {})
        if kind.key in ("aux_losses", "router_modifiers"):
            fields[kind.key] = {misspelt: fields[kind.key][name]}
        else:
            fields[kind.key] = misspelt
        with pytest.raises(ConfigError) as caught:
            MoeLoraConfig(**fields)
        assert f"Unknown {kind.what} {misspelt!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [part for part in PARTS if part[0].key != "scale"],  # which has no options
    ids=lambda x: getattr(x, "name", x),
)
def test_a_misspelt_option_of_any_part_is_named(kind, name):
    with pytest.raises(ConfigError) as caught:
        MoeLoraConfig(**with_part(kind, name, {"no_such_option": 1}))
    message = str(caught.value)
    assert message.startswith(kind.options or kind.key)
    assert "no_such_option" in message


WRONG = [None, True, "text", 0.5, -1, [], [None], {}, {"a": {}}, "", 2**40]


@pytest.mark.parametrize(("kind", "name", "option"), OPTIONS, ids=lambda x: getattr(x, "name", x))
def test_a_value_of_another_type_is_a_sentence_with_its_option(kind, name, option):
    hint = _options(kind.built_in()[name])[option].hint
    wrong = [value for value in WRONG if not fits(value, hint)]
    assert len(wrong) >= 4, "what the part takes is said by the type of its option"
    for value in wrong:
        with pytest.raises(ConfigError) as caught:
            MoeLoraConfig(**with_part(kind, name, {option: value}))
        assert (kind.options or kind.key) in str(caught.value)
        assert repr(option) in str(caught.value)


OUT_OF_RANGE = {
    "router_kwargs": [
        ("top_p", {"p": 1.5}),
        ("top_p", {"p": -1}),
        ("threshold", {"max_threshold": 0}),
        ("sparsegen", {"hidden": 0}),
        ("sparsegen", {"eps": 0}),
        ("sigmoid", {"straight_through": True}),
        ("expert_choice", {"capacity_factor": 0}),
        ("sinkhorn", {"iterations": 0}),
        ("topk", {"weight": "gate"}),
    ],
    "router_score_kwargs": [
        ("mlp", {"width": 8, "swi_x": 2}),
        ("mlp", {"activation": "tanhh"}),
        ("mlp", {"dropout": 1.0}),
        ("cosine", {"temperature": 0}),
        ("embedding", {"width": None, "bias": True}),
        ("multi", {"num_routers": 2, "top": 3}),
        ("prototype", {"compare": "cos"}),
        ("recurrent", {"rounds": 0}),
    ],
    "expert_kwargs": [
        ("shared_a", {"a_dropout": 1.0}),
        ("frozen_sparse_a", {"density": 0}),
        ("mixed_factors", {"n_splits": 3}),  # of 20 experts
        ("tensor", {"order": 1}),
        ("tree", {"fan_out": 5}),
        ("tree", {"activation": "gelu"}),
    ],
    "init_kwargs": [
        ("gaussian", {"std": 0}),
        ("gaussian", {"std_b": -1}),
        ("pissa", {"rho": 0}),
        ("segments", {"init_cof": -1}),
        ("pissa", {"niter": 0}),
        ("adapters", {"paths": []}),
    ],
    "router_input_kwargs": [
        ("sequence", {"pool": "mean-pool"}),
        ("prompt", {"pool": ""}),
        ("task", {"default": -1}),
    ],
    "site_kwargs": [
        ("block", {"single_rank": 0}),
        ("block", {"block": "("}),
        ("layer", {"owner": "["}),
        ("linear", {"share": [["q", "("]]}),
    ],
    "allocation_kwargs": [
        ("layers", {"num_experts": [20, 0]}),
        ("layers", {"r": "4-x"}),
        ("layers", {"num_experts": "triangel"}),
        ("layers", {"alpha": [0]}),
        ("layers", {"r": []}),
        ("pattern", {"r": {"q": 0}}),
        ("pattern", {"alpha": {"q": -1}}),
        ("modules", {"modules": {}}),
        ("modules", {"modules": {"q": {"rank": 1}}}),
        ("modules", {"modules": {"q": {"ranks": [1, 0]}}}),
        ("modules", {"modules": {"q": {"top_k": 0}}}),
    ],
}
OUT_OF_RANGE_CASES = [
    (key, name, options) for key, cases in OUT_OF_RANGE.items() for name, options in cases
]


@pytest.mark.parametrize(("key", "name", "options"), OUT_OF_RANGE_CASES)
def test_a_value_out_of_range_is_refused_as_in_front_of_a_base(key, name, options):
    kind = next(kind for kind in KEYED if kind.options == key)
    with pytest.raises(ConfigError) as caught:
        MoeLoraConfig(**with_part(kind, name, options))
    message = str(caught.value)
    assert key in message or "shape of num_experts" in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", "0.5"),
        ("temperature", None),
        ("jitter", 1),
        ("noise", -0.1),
        ("expert_dropout", 1.0),
        ("capacity", {}),
        ("capacity", {"tokens": 1, "factor": 1}),
        ("capacity", 0.5),
        ("capacity", [1]),
        ("balance_bias", {"rate": 1e-3, "every": 0}),
        ("balance_bias", {"rates": 1e-3}),
    ],
)
def test_a_modifiers_value_is_checked(name, value):
    with pytest.raises(ConfigError, match=rf"router_modifiers\['{name}'\]"):
        MoeLoraConfig(router_modifiers={name: value})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("switch_lb", {"share": "token"}),
        ("contrastive", {"temperature": 0}),
        ("contrastive", {"max_tokens": 1}),
        ("lambda_sparsity", {"form": "analytical"}),
        ("lambda_sparsity", {"k": 20}),  # of 20 experts
        ("localized_cv2", {"delta": 1}),
        ("orthogonal", {"of": "b"}),
    ],
)
def test_a_losss_options_are_checked(name, options):
    with pytest.raises(ConfigError, match=rf"aux_losses\['{name}'\]\['{next(iter(options))}'\]="):
        MoeLoraConfig(**with_part(FAMILIES["losses"], name, options))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router": "hard"}, "top_k=10, but router='hard' selects one expert"),
        ({"expert": "pools"}, "expert='pools' has factors of rank 1, not 4"),
        ({"router_score": "self_rank"}, "router_score='self_rank' needs experts of rank 1"),
        ({"total_rank": True, "r": 30}, "r=30 cannot be split evenly over num_experts=20"),
        ({"site": "block", "universal_expert": "one"}, "does not go with site 'block'"),
        (
            {"router": "softmax", "router_modifiers": {"balance_bias": 1e-3}},
            "which router='softmax' does not",
        ),
        (
            {"allocation": "layers", "allocation_kwargs": {"num_experts": [20, 5]}},
            "top_k=10 is more than num_experts=5",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(fields, message):
    with pytest.raises(ConfigError) as caught:
        MoeLoraConfig(**fields)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        # The allocation gives ranks of 1, whatever r is.
        {"expert": "rank", "allocation": "layers", "allocation_kwargs": {"r": [1]}},
        # A layer has as many experts as target modules, a block's other linears one.
        {"site": "layer", "expert": "rank", "r": 1, "top_k": 2},
        {"site": "block", "router": "topk", "expert_kwargs": {"frozen": True}},
        {"allocation": "pattern", "allocation_kwargs": {"num_experts": {"q_proj": 40}}},
        {"expert": "mixed_factors", "expert_kwargs": {"n_splits": 4}},
        {
            **{"expert": "mixed_factors", "expert_kwargs": {"n_splits": 16}, "top_k": 2},
            **{"allocation": "layers", "allocation_kwargs": {"num_experts": [16, 32]}},
        },
        {
            **{"expert": "mixed_factors", "expert_kwargs": {"n_splits": 8}, "top_k": 2},
            **{"allocation": "pattern", "allocation_kwargs": {"num_experts": {".*": 8}}},
        },
        {"expert": "block_diagonal", "universal_expert": "one"},
        {"expert": "tree", "expert_kwargs": {"children": [4, 2], "fan_out": [2, 1]}},
    ],
)
def test_what_only_a_base_can_settle_is_left_to_it(fields):
    MoeLoraConfig(**fields)


ERRORS = [
    *(TypeError, ValueError, AttributeError, KeyError, IndexError),
    *(ZeroDivisionError, OverflowError, AssertionError, RuntimeError),
]


class Fussy(TopKRouter):
    """A user's router that stumbles over values in ways of its own."""

    def __init__(self, in_features, plan, *, table=(), how: int = 0):
        super().__init__(in_features, plan)
        if how:
            raise ERRORS[how - 1]("not like this")
        if len(table):
            torch.zeros(1).item()  # values, which there are none of without a base


@pytest.mark.parametrize("how", range(1, len(ERRORS) + 1))
def test_what_a_part_stumbles_over_is_a_sentence(how):
    families.register_router("fussy", Fussy)
    with pytest.raises(ConfigError, match=r"router_kwargs=\{'how': \d\} cannot be used by 'fussy'"):
        MoeLoraConfig(router="fussy", router_kwargs={"how": how})


def test_a_part_that_needs_values_is_left_until_there_are_some():
    families.register_router("fussy", Fussy)
    MoeLoraConfig(router="fussy", router_kwargs={"table": [1]})


BAD = [
    ({"router": "topp"}, "Unknown router 'topp'"),
    ({"router_kwargs": {"renormalise": True}}, "router_kwargs has no key 'renormalise'"),
    ({"init": "gaussian", "init_kwargs": {"std": "big"}}, "init_kwargs['std']='big'"),
    ({"aux_losses": {"switch": 0.1}}, "Unknown loss 'switch'"),
    ({"num_experts": 10**9}, "num_experts=1000000000"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
@pytest.mark.parametrize("command", ["train", "plan", "search guilomo --out o"])
def test_every_command_says_so_before_the_base_is_looked_for(command, fields, message, tmp_path):
    """The base is nowhere, and nothing is said about that."""
    recipe = tmp_path / "recipe.yaml"
    content = {
        "model": {"name": str(tmp_path / "nowhere")},
        "adapter": {"preset": "moe_lora", **fields},
        "data": {"tasks": ["sst2"], "data_dir": str(tmp_path)},
    }
    recipe.write_text(yaml.safe_dump(content))
    first, _, rest = command.partition(" --")
    words = [*first.split(), str(recipe), *(f"--{rest}".split() if rest else [])]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1, result.output
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_every_host_says_so_by_the_same_words(fields, message):
    """All of them make the configuration by this function, when they read their arguments."""
    with pytest.raises(ConfigError) as caught:
        adapter_config(fields)
    assert message in str(caught.value)
