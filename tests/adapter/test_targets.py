"""Which modules an adapter goes on: never fewer than were named, and none that cannot learn."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from packed import float8_linears, packed_linears, packed_tensors
from peft import PeftModel, get_peft_model
from tiny import tiny_llama
from torch import nn
from transformers import (
    DebertaConfig,
    DebertaForMaskedLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    WavLMConfig,
    WavLMModel,
)

from moelora_plugin import MoeLoraConfig
from moelora_plugin.errors import ConfigError
from moelora_plugin.layers.linear_maps import maps_rows, weights_read
from moelora_plugin.model import moelora_layers

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DECODER: dict[str, Any] = {**SMALL, "num_key_value_heads": 2}
MOE: dict[str, Any] = {**DECODER, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
LISTED = "adamole"  # a preset that names its target modules
MLP = ["gate_proj", "up_proj", "down_proj"]
MHA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


def qwen3_moe() -> nn.Module:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**MOE, head_dim=4, num_experts=4))


def qwen2_moe() -> nn.Module:
    config = Qwen2MoeConfig(**MOE, num_experts=4, shared_expert_intermediate_size=8)
    return Qwen2MoeForCausalLM(config)


def deepseek_v3() -> nn.Module:
    heads = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4}
    heads |= {"v_head_dim": 4, "qk_nope_head_dim": 4}
    groups = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**MOE, **heads, **groups))


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=4))


def gpt_oss() -> nn.Module:
    return GptOssForCausalLM(GptOssConfig(**DECODER, head_dim=4, num_local_experts=4))


def phimoe() -> nn.Module:
    return PhimoeForCausalLM(PhimoeConfig(**DECODER, num_local_experts=4))


def llama4() -> nn.Module:
    sizes = {"head_dim": 4, "intermediate_size_mlp": 24, "num_local_experts": 4}
    return Llama4ForCausalLM(Llama4TextConfig(**DECODER, **sizes, attention_chunk_size=8))


def mamba() -> nn.Module:
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    return MambaForCausalLM(MambaConfig(**sizes))


def mamba2() -> nn.Module:
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    return Mamba2ForCausalLM(Mamba2Config(**sizes, num_heads=4, head_dim=8, n_groups=1))


def jamba() -> nn.Module:
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4}
    experts = {"expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4}
    return JambaForCausalLM(JambaConfig(**DECODER, **layers, **experts))


def siglip() -> nn.Module:
    return SiglipVisionModel(SiglipVisionConfig(**MHA, image_size=8, patch_size=4))


def wavlm() -> nn.Module:
    convolutions = {"conv_dim": (16,), "conv_kernel": (4,), "conv_stride": (2,)}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return WavLMModel(WavLMConfig(**MHA, **convolutions, **positions))


def deberta() -> nn.Module:
    sizes = {**MHA, "vocab_size": 40, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    return DebertaForMaskedLM(DebertaConfig(**sizes))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4))


def phi() -> nn.Module:
    return PhiForCausalLM(PhiConfig(**SMALL))


def config_for(targets: Any, **keys: Any) -> MoeLoraConfig:
    return MoeLoraConfig(r=2, num_experts=2, top_k=1, target_modules=targets, **keys)


def adapted_names(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name in moelora_layers(model)}


def refusal(base: Callable[[], nn.Module], targets: Any, **keys: Any) -> str:
    model = base()
    with pytest.raises(ConfigError) as caught:
        get_peft_model(model, config_for(targets, **keys))
    assert not moelora_layers(model)  # nothing was put on before it was refused
    message = str(caught.value)
    assert message.count("\n") == 0
    assert message.endswith(".")
    return message


# Experts that are fused parameters.


@pytest.mark.parametrize(
    ("base", "targets", "parts"),
    [
        (qwen3_moe, ["q_proj", *MLP], ["names down_proj, gate_proj, up_proj, which match no"]),
        (qwen3_moe, ["q_proj", "quary"], ["names quary, which matches no", "gate_up_proj (gate_"]),
        (mixtral, ["q_proj", "w1", "w2"], ["names w1, w2", "gate_up_proj (w1, w3)", "(w2)"]),
        (mixtral, ["experts.0.w1", "q_proj"], ["names experts.0.w1, which"]),
        (gpt_oss, ["q_proj", "gate_up_proj"], ["names gate_up_proj", "k_proj, lm_head, o_proj"]),
        (qwen3_moe, r".*\.(q_proj|gate_proj)", ["matches fused parameters", "'experts'"]),
        (mixtral, r".*\.experts\.\d+\.w2|.*q_proj", ["matches fused parameters"]),
    ],
)
def test_experts_that_no_linear_holds_are_not_passed_over(base, targets, parts):
    message = refusal(base, targets)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("base", "shown"),
    [
        (qwen2_moe, "shared_expert.down_proj, shared_expert.gate_proj, shared_expert.up_proj"),
        (deepseek_v3, "mlp.down_proj, mlp.gate_proj, mlp.up_proj, shared_experts.down_proj"),
        (llama4, "shared_expert.down_proj, shared_expert.gate_proj, shared_expert.up_proj"),
    ],
)
def test_a_name_of_linears_here_and_of_fused_experts_there_is_refused(base, shown):
    message = refusal(base, ["o_proj", *MLP])
    assert "names both linears and fused parameters of experts" in message
    assert shown in message
    # What the message offers works.
    names = message.rpartition("names: ")[2].rstrip(".").split(", ")
    assert adapted_names(get_peft_model(base(), config_for(names))) == set(MLP)


def test_experts_are_left_out_by_exclude_modules():
    for exclude in (["experts"], r".*\.experts(\..*)?"):
        model = get_peft_model(qwen2_moe(), config_for(r".*_proj", exclude_modules=exclude))
        assert adapted_names(model) == {"q_proj", "k_proj", "v_proj", "o_proj", *MLP}


@pytest.mark.parametrize("base", [qwen3_moe, qwen2_moe, deepseek_v3, mixtral, gpt_oss, jamba])
def test_all_linear_says_in_one_line_which_experts_it_leaves_out(base):
    with pytest.warns(UserWarning, match="all-linear' leaves out, of .*the experts, which") as seen:
        model = get_peft_model(base(), config_for("all-linear"))
    assert sum("all-linear" in str(w.message) for w in seen) == 1
    assert {"q_proj", "o_proj"} & adapted_names(model) or "o_proj" in adapted_names(model)


def test_all_linear_is_silent_where_it_reaches_all_and_where_the_rest_is_excluded():
    for base, keys in ((tiny_llama, {}), (qwen3_moe, {"exclude_modules": ["experts"]})):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*all-linear")
            get_peft_model(base(), config_for("all-linear", **keys))


@pytest.mark.filterwarnings("ignore:target_modules='all-linear' leaves out")
@pytest.mark.parametrize("base", [tiny_llama, qwen3_moe, llama4])
def test_all_linear_in_a_list_takes_the_names_beside_it_as_well(base):
    alone = set(moelora_layers(get_peft_model(base(), config_for("all-linear"))))
    both = set(moelora_layers(get_peft_model(base(), config_for(["all-linear", "lm_head"]))))
    assert {name.rpartition(".")[2] for name in both - alone} == {"lm_head"}
    assert alone < both
    assert set(moelora_layers(get_peft_model(base(), config_for(["all-linear"])))) == alone
    assert "quary'] matches no module" in refusal(base, ["all-linear", "quary"])


@pytest.mark.filterwarnings("ignore:target_modules='all-linear' leaves out")
def test_all_linear_in_a_list_still_refuses_a_name_of_what_cannot_learn():
    assert "cannot have router: " in refusal(llama4, ["all-linear", "router"])


@pytest.mark.filterwarnings("ignore:target_modules='all-linear' leaves out")
def test_all_linear_goes_on_the_layers_that_are_named(tmp_path):
    for keys in ({"layers_to_transform": [1]}, {"layers_to_transform": 1, "layers_pattern": "h"}):
        base = gpt2 if "layers_pattern" in keys else qwen3_moe
        every = set(moelora_layers(get_peft_model(base(), config_for("all-linear"))))
        model = get_peft_model(base(), config_for("all-linear", **keys))
        found = set(moelora_layers(model))
        assert found == {name for name in every if ".1." in name}
        model.save_pretrained(tmp_path)
        assert set(moelora_layers(PeftModel.from_pretrained(base(), tmp_path))) == found
    message = refusal(tiny_llama, "all-linear", layers_to_transform=[0, 9])
    assert "names layer 9, in which target_modules='all-linear' matches nothing" in message
    assert "layers_to_transform=[9] leave out" in refusal(
        tiny_llama, "all-linear", layers_to_transform=[9]
    )


@pytest.mark.parametrize("pack", [packed_linears, packed_tensors, float8_linears])
def test_all_linear_reaches_quantised_linears(pack):
    base = tiny_llama()
    expected = set(moelora_layers(get_peft_model(tiny_llama(), config_for("all-linear"))))
    pack(base)
    assert set(moelora_layers(get_peft_model(base, config_for("all-linear")))) == expected


# Names, and the keys that narrow them.


def test_every_name_must_find_something():
    assert "names c_atn, which matches no module" in refusal(gpt2, ["c_attn", "c_atn"])


def test_a_default_list_says_what_the_base_lacks_and_goes_on():
    preset = MoeLoraConfig.from_preset(LISTED, num_experts=2, top_k=1)
    with pytest.warns(UserWarning, match=r"default target_modules=.* names o_proj, which matches"):
        assert adapted_names(get_peft_model(phi(), preset)) == {"q_proj", "k_proj", "v_proj"}
    # The same list from a person is not the preset's.
    named = MoeLoraConfig.from_preset(
        LISTED, num_experts=2, top_k=1, target_modules=preset.target_modules
    )
    with pytest.raises(ConfigError, match="names o_proj"):
        get_peft_model(phi(), named)


def test_a_default_list_passes_over_a_name_of_what_cannot_learn():
    config = config_for(["q_proj", "router"])
    config.targets_by_default = True
    with pytest.warns(UserWarning, match=r"leaves out, of PhimoeForCausalLM: mlp.router"):
        assert adapted_names(get_peft_model(phimoe(), config)) == {"q_proj"}
    config = config_for(["router"])
    config.targets_by_default = True
    with pytest.raises(ConfigError, match=r"cannot have model\.layers\.0\.mlp\.router"):
        get_peft_model(phimoe(), config)


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"exclude_modules": ["q_proj"]}, "exclude_modules=['q_proj'] leave out"),
        ({"exclude_modules": ".*"}, "exclude_modules='.*' leave out"),
        ({"layers_to_transform": [9]}, "layers_to_transform=[9] leave out"),
        ({"modules_to_save": ["q_proj"]}, "modules_to_save=['q_proj'] leave out"),
        (
            {"modules_to_save": ["self_attn"], "layers_to_transform": 0},
            "modules_to_save=['self_attn'] and layers_to_transform=0 leave out",
        ),
    ],
)
def test_where_other_keys_leave_all_of_it_out_they_are_named(keys, part):
    assert part in refusal(tiny_llama, ["q_proj"], **keys)


@pytest.mark.parametrize("layers", [[0, 2], [-1, 0], [0, 99]])
def test_every_layer_must_exist(layers):
    message = refusal(tiny_llama, ["q_proj"], layers_to_transform=layers)
    assert f"layers_to_transform={layers} names layer" in message


# Linears that an adapter would break, or that would not learn.


@pytest.mark.parametrize(
    ("base", "left_out", "kept"),
    [
        (llama4, {"router"}, {"q_proj", "down_proj"}),
        (phimoe, {"router"}, {"q_proj"}),
        (mamba, {"dt_proj", "out_proj", "x_proj"}, {"in_proj"}),
        (mamba2, {"out_proj"}, {"in_proj"}),
        (jamba, {"dt_proj"}, {"in_proj", "x_proj", "out_proj"}),
        (wavlm, {"q_proj", "k_proj", "v_proj"}, {"intermediate_dense", "output_dense"}),
    ],
)
def test_all_linear_leaves_out_what_cannot_learn_and_a_name_for_it_is_refused(base, left_out, kept):
    with pytest.warns(UserWarning, match="all-linear' leaves out") as seen:
        found = adapted_names(get_peft_model(base(), config_for("all-linear")))
    assert found >= kept
    assert not found & left_out
    line = next(str(w.message) for w in seen if "all-linear" in str(w.message))
    for name in left_out:
        assert f".{name}" in line
        assert f"cannot have {name}: " in refusal(base, [name])


def test_a_name_with_one_module_that_cannot_learn_leaves_that_out():
    with pytest.warns(UserWarning, match=r"leaves out, of SiglipVisionModel: attention.out_proj"):
        model = get_peft_model(siglip(), config_for(["out_proj", "fc2"]))
    assert len(moelora_layers(model)) == 5  # two layers and the head's fc2
    assert "cannot have attention.out_proj" in refusal(siglip, ["fc1", "attention.out_proj"])


def test_a_branch_that_takes_a_part_of_the_weight_is_no_obstacle():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*leaves out")
        assert "in_proj" in adapted_names(get_peft_model(deberta(), config_for("all-linear")))


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Wider(nn.Linear):
    def forward(self, x):
        return torch.cat([super().forward(x)] * 2, -1)


class Grouped(nn.Linear):
    def forward(self, x):
        return super().forward(x.reshape(-1, 3, self.in_features)).sum(1)


class Sized(nn.Linear):
    def forward(self, x, sizes):
        return super().forward(x)


class Stack(nn.Module):
    """Of experts, with features and a forward that asks for more than x."""

    def __init__(self):
        super().__init__()
        self.in_features = self.out_features = 4
        self.weight = nn.Parameter(torch.zeros(2, 4, 4))

    def forward(self, x, group):
        return x @ self.weight[group]


def test_a_linear_with_a_forward_of_its_own_is_judged_by_what_it_returns():
    assert maps_rows(nn.Linear(4, 6))
    assert maps_rows(Doubled(4, 6))
    assert not any(maps_rows(kind(4, 6)) for kind in (Pair, Wider, Grouped, Sized))
    assert not maps_rows(Stack())


class Reads(nn.Module):
    def forward(self, x):
        return self._inner(x.to(self.dtype_only.weight.dtype), 1)

    def _inner(self, x, step):
        if step:
            x = nn.functional.linear(x, weight=self.handed.weight)
        x = self.called(x) + x @ self.multiplied.weight
        return (
            self.inner.deep(x) + self.inner.read.weight.sum() + self.handed(x) + self.dtype_only(x)
        )

    def unused(self, x):
        return x @ self.called.weight


def test_what_the_code_of_a_parent_says_of_its_children():
    assert weights_read(Reads) == {
        "handed": "in a branch",
        "multiplied": "never called",
        "inner.read": "never called",
    }


@pytest.mark.parametrize("name", ["mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"])
def test_what_peft_refuses_for_lora_is_refused(name):
    """PEFT has a list of these; here the code of each says it."""
    from importlib import import_module

    module = import_module(f"transformers.models.{name}.modeling_{name}")
    mixers = [c for n, c in vars(module).items() if n.endswith(("Mixer", "MambaLayer"))]
    assert any("out_proj" in weights_read(mixer) for mixer in mixers if isinstance(mixer, type))


# Saved adapters are what they are.


def saved_with(names: list[str], base: nn.Module, folder) -> dict[str, torch.Tensor]:
    """As a version wrote it that did not look at names: with some that find nothing."""
    model = get_peft_model(base, config_for(["q_proj"]))
    model.peft_config["default"].target_modules = set(names)
    model.save_pretrained(folder)
    return {n: p for n, p in model.state_dict().items() if "moelora_" in n}


def test_a_saved_adapter_with_names_that_find_nothing_loads(tmp_path):
    before = saved_with(["q_proj", *MLP], qwen3_moe(), tmp_path)
    for trainable in (False, True):
        loaded = PeftModel.from_pretrained(qwen3_moe(), tmp_path, is_trainable=trainable)
        found = {n: p for n, p in loaded.state_dict().items() if "moelora_" in n}
        assert before.keys() == found.keys()
        assert all(torch.equal(before[name], found[name]) for name in before)


# Linears that no step reaches.


class Half(nn.Module):
    """Calls some of its linears; of each layer's experts those that `turn` names."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "used": nn.Linear(4, 4),
                    "unused": nn.Linear(4, 4),
                    "experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(3)),
                }
            )
            for _ in range(2)
        )
        self.dropped = nn.Linear(4, 4)
        self.turn = 0

    def forward(self, x):
        self.dropped(x)
        for layer in self.layers:
            x = layer["experts"][self.turn](layer["used"](x))
        return x


def half(**keys: Any) -> PeftModel:
    model = get_peft_model(Half(), config_for("all-linear", **keys))
    return model.train()


def test_a_linear_that_the_first_step_does_not_reach_is_named_once():
    model = half()
    with pytest.warns(UserWarning, match="did not reach 3 adapted linears") as seen:
        model(torch.randn(2, 4)).sum().backward()
    message = str(seen[0].message)
    assert "dropped, layers.*.unused; " in message
    assert "experts" not in message  # one of them had the token
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 4)).sum().backward()


def test_where_all_are_reached_or_nothing_trains_nothing_is_said():
    names = ["used", "experts.0"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(Half(), config_for(names))
        with torch.no_grad():
            model(torch.randn(2, 4))
        model.eval()(torch.randn(2, 4)).sum().backward()
        model.train()(torch.randn(2, 4)).sum().backward()
        half().requires_grad_(False)(torch.randn(2, 4, requires_grad=True)).sum().backward()


def test_recomputation_is_no_end_of_a_step():
    from torch.utils.checkpoint import checkpoint

    class Segments(Half):
        def forward(self, x):
            for layer in self.layers:
                x = checkpoint(layer["used"], x, use_reentrant=True)
            return x

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(Segments(), config_for(["used"])).train()
        model(torch.randn(2, 4, requires_grad=True)).sum().backward()


def test_the_watch_leaves_with_the_adapter():
    model = half()
    base = model.unload()
    assert not base._forward_hooks
    assert not base._forward_pre_hooks


def test_running_statistics_that_no_adapter_holds_are_named():
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))

    def step(frozen: bool = False, **keys: Any) -> None:
        model = get_peft_model(base(), config_for(["0", "2"], **keys)).train()
        if frozen:
            model.base_model.model[1].eval()
        model(torch.randn(5, 4)).sum().backward()

    with pytest.warns(UserWarning, match="running statistics of the base's 1 batch norms.*: 1;"):
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(modules_to_save=["1"])
        step(frozen=True)
