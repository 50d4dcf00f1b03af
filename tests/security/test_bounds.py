"""Sizes, types and patterns are checked before anything is built from them."""

from __future__ import annotations

import dataclasses
import json
import re
import time
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.utils import TaskType
from tiny import tiny_llama, tiny_tokenizer

from moelora_plugin import PRESETS, MoeLoraConfig
from moelora_plugin.allocation.base import plan_of
from moelora_plugin.errors import ConfigError, MoeLoraError
from moelora_plugin.field_checks import _patterns
from moelora_plugin.patterns import require_cheap, ways
from moelora_plugin.values import MAX_EXPERTS, MAX_RANK

FIELDS = [field.name for field in dataclasses.fields(MoeLoraConfig)]
SAVED = {"peft_type": "MOELORA", "peft_version": "0.19.0"}


def made(**fields) -> str | None:
    """What is said against a configuration; None where nothing."""
    try:
        MoeLoraConfig(**fields)
    except MoeLoraError as error:
        message = str(error)
        assert len(message) < 1500, "a sentence, not the value that it is about"
        assert "\n" not in message
        return message
    return None


# Sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 10**9},
        {"num_experts": 3_000_000, "top_k": 1},
        {"num_experts": 10**400},
        {"num_experts": 10**9, "top_k": 10**9},
        {"r": 10**9},
        {"r": 10**9, "num_experts": 1, "top_k": 1},
        {"r": MAX_RANK, "num_experts": 2, "top_k": 1},
        {"r": 10**9, "total_rank": True},
        {"allocation": "layers", "allocation_kwargs": {"num_experts": "1000000000"}},
        {"allocation": "layers", "allocation_kwargs": {"num_experts": [10**9, 20]}},
        {"allocation": "layers", "allocation_kwargs": {"r": [[10**9] * 20]}},
        {"allocation": "layers", "allocation_kwargs": {"r": [4] * 10_000}},
        {"allocation": "layers", "allocation_kwargs": {"r": "-".join(["4"] * 10_000)}},
        {"allocation": "modules", "allocation_kwargs": {"modules": {"a": {"num_experts": 10**9}}}},
        {"allocation": "modules", "allocation_kwargs": {"modules": {"a": {"ranks": [1] * 10**4}}}},
        {"router_score": "mlp", "router_score_kwargs": {"width": 10**9}},
        {"router_score": "mlp", "router_score_kwargs": {"swi_x": 10**9}},
        {"router_score": "mlp", "router_score_kwargs": {"depth": 10**6}},
        {"router_score": "mlp", "router_score_kwargs": {"depth": 1000, "width": 10_000}},
        {"router_score": "cosine", "router_score_kwargs": {"width": 10**8}},
        {"router_score": "embedding", "router_score_kwargs": {"num_ids": 10**8}},
        {"router_score": "multi", "router_score_kwargs": {"num_routers": 10**8}},
        {"router_score": "recurrent", "router_score_kwargs": {"rounds": 10**6}},
        {"router_score": "recurrent", "router_score_kwargs": {"width": 10**6}},
        {"router": "sparsegen", "router_kwargs": {"hidden": 10**8}},
        {"router": "sinkhorn", "router_kwargs": {"iterations": 10**6}},
        {"expert": "tree", "expert_kwargs": {"children": 10**8, "fan_out": 2}},
        {"expert": "tree", "expert_kwargs": {"children": [9] * 10**4, "fan_out": [2] * 10**4}},
        {"expert": "tree", "expert_kwargs": {"gate_width": 10**8}},
        {"expert": "tensor", "expert_kwargs": {"order": 10**6}},
        {"init": "pissa", "init_kwargs": {"niter": 10**6}},
        {"target_modules": "q" * 10**6},
        {"target_modules": ["q_proj"] * 1_000_001},
        {"trainable_token_indices": [10**12]},
        {"base_model_name_or_path": "a" * 10**6},
        {"router_kwargs": {str(n): n for n in range(10_000)}},
    ],
    ids=lambda fields: str(fields)[:60],
)
@pytest.mark.parametrize("origin", [{}, SAVED], ids=["by a person", "saved"])
def test_what_no_model_holds_is_refused_at_once(fields, origin):
    tracemalloc.start()
    started = time.monotonic()
    try:
        message = made(**fields, **origin)
        used = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert used < 64 * 2**20
    # Room for a busy machine: building the sizes above takes minutes, or all memory.
    assert time.monotonic() - started < 10
    assert message is not None
    # The key of the one field, or of the field whose value does not fit it.
    assert any(key in message for key in (*fields, "num_experts", "rank"))


def test_the_bounds_are_far_above_every_preset():
    for preset in PRESETS.values():
        experts = preset.overrides.get("num_experts", 20)
        assert experts * 16 <= MAX_EXPERTS
        assert experts * preset.overrides.get("r", 4) * 16 <= MAX_RANK
    assert made(num_experts=MAX_EXPERTS, r=MAX_RANK // MAX_EXPERTS) is None
    assert made(num_experts=1, top_k=1, r=MAX_RANK) is None


def test_the_plan_of_a_module_is_bounded_wherever_its_numbers_come_from():
    with pytest.raises(ConfigError, match=r"num_experts=10000000000 must not be more than 4,096\."):
        plan_of(MoeLoraConfig(), 10**10, 1, 1, 1.0)
    with pytest.raises(ConfigError, match="have the rank 10000000000 together, more than 65,536"):
        plan_of(MoeLoraConfig(), 1, 1, 10**10, 1.0)


# Types ---------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31 + 1, -(10**400), 10**9])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["topk", "none", "linear", "MOELORA", "CAUSAL_LM", "all-linear", "2-4"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=3)
            | st.sampled_from(["path", "paths", "switch_lb", "coefficient", "r"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@given(key=st.sampled_from(FIELDS), value=JSON, saved=st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_value_of_any_field_is_taken_or_a_sentence(key, value, saved):
    fields = {**(SAVED if saved else {}), key: value}
    if made(**fields) is not None:
        return
    config = MoeLoraConfig(**fields)
    # What is taken can be saved, and is the same when it is read again.
    content = json.loads(json.dumps(config.to_dict()))
    if key != "auto_mapping":  # which is dropped where it names another library
        assert MoeLoraConfig(**content).to_dict() == config.to_dict()


MAPPINGS = [name for name in FIELDS if name.endswith("_kwargs") or name == "router_modifiers"]
# A part with options for each mapping, so that values of options are met too.
OPTIONS = {
    "site_kwargs": {"site": "block"},
    "router_kwargs": {"router": "sigmoid"},
    "router_score_kwargs": {"router_score": "mlp"},
    "router_input_kwargs": {"router_input": "task", "router_score": "embedding"},
    "expert_kwargs": {"expert": "tree"},
    "allocation_kwargs": {"allocation": "layers"},
    "init_kwargs": {"init": "pissa"},
    "router_modifiers": {},
}
NAMES = {
    "site_kwargs": ["block", "single_rank"],
    "router_kwargs": ["max_threshold", "straight_through", "normalize", "relaxed"],
    "router_score_kwargs": ["width", "swi_x", "depth", "activation", "gated", "dropout", "bias"],
    "router_input_kwargs": ["default"],
    "expert_kwargs": ["children", "fan_out", "activation", "gate_width"],
    "allocation_kwargs": ["num_experts", "top_k", "r", "alpha"],
    "init_kwargs": ["rho", "init_cof", "niter"],
    "router_modifiers": ["temperature", "capacity", "balance_bias", "expert_dropout", "jitter"],
}


@given(key=st.sampled_from(MAPPINGS), data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_value_of_any_option_is_taken_or_a_sentence(key, data):
    options = data.draw(st.dictionaries(st.sampled_from(NAMES[key]), JSON, max_size=3))
    message = made(**{**OPTIONS[key], key: options})
    assert message is None or key in message or "num_experts" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("base_model_name_or_path", 3),
        ("base_model_name_or_path", ["a"]),
        ("revision", {}),
        ("revision", True),
        ("inference_mode", "yes"),
        ("inference_mode", None),
        ("modules_to_save", "score"),
        ("modules_to_save", [None]),
        ("trainable_token_indices", {"embed": ["a"]}),
        ("trainable_token_indices", [1.5]),
        ("layers_to_transform", [True]),
        ("layers_to_transform", "0"),
        ("auto_mapping", []),
        ("task_type", 0),
        ("task_type", "CAUSAL"),
        ("peft_version", 1),
        ("target_modules", [1, "q_proj"]),
        ("target_modules", {"q_proj": 1}),
        ("exclude_modules", [["q_proj"]]),
        ("use_rslora", "false"),
        ("total_rank", 1),
        ("router", None),
        ("router", ["topk"]),
        ("scale", {"alpha": 1}),
        ("format_version", True),
        ("router_kwargs", {1: 2}),
        ("router_kwargs", {"renormalize": object()}),
        ("router_modifiers", [["temperature", 1]]),
        ("aux_losses", {"switch_lb": [0.1]}),
        ("aux_losses", {"switch_lb": {"coefficient": float("nan")}}),
    ],
)
def test_a_wrong_type_names_its_key(key, value):
    message = made(**{key: value})
    assert message is not None
    assert message.startswith(key)


def test_a_key_that_is_no_text_is_a_sentence():
    with pytest.raises(ConfigError, match=r"router_modifiers=\{None: 1\} must map names to values"):
        MoeLoraConfig(router_modifiers={None: 1})
    with pytest.raises(ConfigError, match=r"has the key 3, which must be text"):
        MoeLoraConfig(aux_losses={"switch_lb": {"coefficient": 1, "share": {3: 4}}})


@pytest.mark.parametrize("text", ["a" * 100_000, "a b " * 25_000], ids=["word", "words"])
@pytest.mark.parametrize("key", ["router", "site", "init", "expert", "allocation", "scale"])
def test_a_message_about_a_long_name_is_short_and_has_its_remedy(key, text):
    with pytest.raises(ConfigError) as error:
        MoeLoraConfig(**{key: text, "peft_type": "MOELORA"})
    assert len(str(error.value)) < 4000
    assert str(error.value).endswith("to a command of moelora.")


def test_members_of_enums_are_still_taken():
    config = MoeLoraConfig(task_type=TaskType.CAUSAL_LM, target_modules={"v_proj", "q_proj"})
    assert config.target_modules == ["q_proj", "v_proj"]
    assert MoeLoraConfig(**config.to_dict()) == config


# Patterns ------------------------------------------------------------------------------------

HANGING = [
    r"(a+)+$",
    r"(.*)*x",
    r"(\w|\w\w)+x",
    r"([a-z]+)*\d",
    r"(a|a)*b",
    r"(x+x+)+y",
    r"(.*a){20}",
    r"((a{1,50}){1,50}){1,50}b",
    r"(?:.*?,){9}x",
    r".*.*.*.*.*.*x",
    "a?" * 40 + "a" * 40,
    "(a|a)" * 40 + "x",
    r"(?=(a+)+b)a",
    r"(?!(a+)+b).*",
    r"(a*)*b",
    r"^(([a-z])+.)+[A-Z]([a-z])+$",
]
LEGAL = [
    r".*\.(q|k|v|o)_proj",
    r"model\.layers\.\d+\.self_attn\.(q_proj|v_proj)",
    r".*layers\.(?:[0-9]|1[0-5])\..*(q_proj|v_proj)$",
    r"(\w+\.)*q_proj",
    r"([^.]+\.)+q_proj",
    r"^(?!.*visual).*(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*",
    r"(?:.*?(?:vision|language|text).*?(?:self_attn|attention|attn|mlp).*?(?:q_proj|k_proj).*?)",
    r"^(language_model|model)(?=\.).*\.(q_proj|v_proj)$",
    r"(?i).*\.Q_PROJ",
    r"(.*\.)?(layers[.](0|1)[.].*)",
    r"all-linear",
    r"q_proj",
    r"model\.layers\.(0|1|2)\.(mlp|self_attn)\.[a-z_]+",
]
# Each where a pattern may stand: the field, its wrapping into a configuration, what is allowed.
PLACES = {
    "target_modules": lambda p: {"target_modules": p},
    "exclude_modules": lambda p: {"target_modules": ["q_proj"], "exclude_modules": p},
    "modules_to_save": lambda p: {"modules_to_save": ["score", p]},
    "layers_pattern": lambda p: {"target_modules": ["q_proj"], "layers_pattern": [p]},
    "allocation_kwargs": lambda p: {"allocation": "pattern", "allocation_kwargs": {"r": {p: 2}}},
    "site_kwargs": lambda p: {"site_kwargs": {"share": [["q_proj", p]]}},
    "site_kwargs of layer": lambda p: {"site": "layer", "site_kwargs": {"owner": p}},
    "site_kwargs of block": lambda p: {"site": "block", "site_kwargs": {"block": p}},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("pattern", HANGING)
def test_a_strangers_pattern_that_can_hang_is_refused(place, pattern):
    message = made(**PLACES[place](pattern), **SAVED)
    assert message is not None
    assert message.startswith(place.partition(" ")[0])
    assert "is not taken from a saved file; write names in its place" in message


@pytest.mark.parametrize("place", PLACES)
def test_a_persons_pattern_is_that_persons(place):
    assert made(**PLACES[place](r"(\w|\w\w)+x")) is None


@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_pattern_is_a_sentence(place):
    for origin in ({}, SAVED):
        message = made(**PLACES[place]("q_(proj"), **origin)
        assert message is not None
        assert "regular expression" in message


@pytest.mark.parametrize("pattern", LEGAL)
def test_patterns_of_hosts_and_people_are_taken(pattern):
    assert made(target_modules=pattern, **SAVED) is None


@pytest.mark.parametrize("pattern", LEGAL)
def test_what_is_taken_is_quick_on_names_made_to_be_slow(pattern):
    """The bound is about a hundred times what the slowest of them takes."""
    for letter in ("q_proj.", "a", "layers.0.", "visual", "1", "model.layers.11."):
        started = time.monotonic()
        re.fullmatch(pattern, letter * (80 // len(letter)) + "!")
        assert time.monotonic() - started < 2


ATOMS = st.sampled_from(["a", "b", r"\d", r"\w", ".", "[ab]", "[^a]", "ab", r"\."])


def repeated(inner):
    suffix = st.sampled_from(["", "*", "+", "?", "{1,3}", "*?", "{2,}"])
    group = st.builds("({})".format, inner)
    return (
        st.builds("{}{}".format, group, suffix)
        | st.builds("{}{}".format, inner, inner)
        | st.builds("({}|{})".format, inner, inner)
    )


@given(pattern=st.recursive(ATOMS, repeated, max_leaves=6), letters=st.text("ab1.", max_size=2))
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_pattern_is_slow_that_passes(pattern, letters):
    try:
        require_cheap("key", pattern)
    except ConfigError:
        return
    text = ((letters or "a") * 26)[:26] + "!"  # an exponential pattern takes seconds on 26 letters
    started = time.monotonic()
    re.fullmatch(pattern, text)
    assert time.monotonic() - started < 1, (pattern, text, ways(pattern))


def test_every_pattern_of_a_configuration_is_looked_at():
    """What PEFT and our own code match by, each wrapped as it is matched."""
    config = MoeLoraConfig(
        target_modules=["q"],
        exclude_modules="lm_head",
        layers_pattern=["h"],
        modules_to_save=["score"],
        allocation="pattern",
        allocation_kwargs={"r": {"q": 2}},
        site_kwargs={"share": [["q", "k"]]},
    )
    keys = [key for key, *_ in _patterns(config)]
    assert keys == [
        *("exclude_modules", "layers_pattern", "modules_to_save"),
        *("allocation_kwargs['r']", "site_kwargs['share']", "site_kwargs['share']"),
    ]


def test_a_saved_adapter_with_a_pattern_loads_as_before(edited):
    folder = edited(target_modules=r"(\w+\.)*(q|v)_proj")
    model = tiny_llama(len(tiny_tokenizer()), hidden=16, layers=1)
    loaded = PeftModel.from_pretrained(model, str(folder))
    assert loaded.peft_config["default"].target_modules == r"(\w+\.)*(q|v)_proj"
