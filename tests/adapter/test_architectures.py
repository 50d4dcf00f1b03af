"""The adapter on a small random model of each supported architecture."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from moelora_plugin import MoeLoraConfig
from moelora_plugin.model import moelora_layers

VOCABULARY = 40
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IMAGE_TOKEN = 39
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# On LLaVA: the language model's linears and the vision tower's, not the projector between them.
LLAVA_LINEARS = (
    r".*(language_model|vision_tower).*\.(q_proj|v_proj|o_proj|out_proj|up_proj|down_proj|fc1|fc2)"
)


def gpt2():
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config)


def bert():
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def phi():
    keys = {k: v for k, v in DECODER.items() if k != "head_dim"}
    return PhiForCausalLM(PhiConfig(**keys))


def llava():
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
    )
    text = LlamaConfig(**DECODER)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE_TOKEN,
            vision_feature_layer=-1,  # by default the tower's last layer is not used at all
        )
    )


# name -> (how to build it, target_modules, number of adapted modules, further config keys)
ARCHITECTURES = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**DECODER)), "all-linear", 14, {}),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**DECODER)), ATTENTION, 8, {}),
    "qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(**DECODER)), "all-linear", 14, {}),
    "gemma2": (lambda: Gemma2ForCausalLM(Gemma2Config(**DECODER)), None, 4, {}),
    "gemma3": (lambda: Gemma3ForCausalLM(Gemma3TextConfig(**DECODER)), ATTENTION, 8, {}),
    "phi": (phi, ["q_proj", "v_proj", "dense", "fc1", "fc2"], 10, {}),
    "phi3": (lambda: Phi3ForCausalLM(Phi3Config(**DECODER)), ["qkv_proj", "gate_up_proj"], 4, {}),
    "glm": (lambda: GlmForCausalLM(GlmConfig(**DECODER)), ["q_proj", "gate_up_proj"], 4, {}),
    "glm4": (lambda: Glm4ForCausalLM(Glm4Config(**DECODER)), "all-linear", 12, {}),
    "gpt2": (gpt2, ["c_attn", "c_proj", "c_fc"], 8, {}),
    "bert": (bert, ["query", "value", "dense"], 11, {"modules_to_save": ["classifier"]}),
    "llava": (llava, LLAVA_LINEARS, 20, {}),
}
GENERATORS = [name for name in ARCHITECTURES if name != "bert"]


def base(name: str) -> nn.Module:
    torch.manual_seed(0)
    return ARCHITECTURES[name][0]().eval()


def config_for(name: str, **overrides) -> MoeLoraConfig:
    _, target_modules, _, further = ARCHITECTURES[name]
    keys = {"r": 2, "num_experts": 3, "top_k": 2, "lora_dropout": 0.0}
    return MoeLoraConfig(target_modules=target_modules, **keys, **further, **overrides)


def inputs_for(name: str, length: int = 12) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, 38, (2, length))
    if name != "llava":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ids[:, 1:5] = IMAGE_TOKEN  # (8 / 4)^2 patches
    pixels = torch.randn(2, 3, 8, 8)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def set_every_expert_at_work(model: nn.Module) -> None:
    """B starts at zero, which hides the adapter and gives A and the gates a zero gradient."""
    torch.manual_seed(2)
    for layer in moelora_layers(model).values():
        for _, b in layer.expert_weights():
            b.normal_(std=0.5)
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            parameter.data.normal_()


def adapted(name: str, **overrides) -> PeftModel:
    model = get_peft_model(base(name), config_for(name, **overrides))
    set_every_expert_at_work(model)
    return model.eval()


def logits(model: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs_for(name)).logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_does(name):
    plain = logits(base(name), name)
    model = get_peft_model(base(name), config_for(name)).eval()
    assert len(moelora_layers(model)) == ARCHITECTURES[name][2]
    assert torch.equal(logits(model, name), plain)  # B is zero: zero is added
    set_every_expert_at_work(model)
    assert not torch.allclose(logits(model, name), plain)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_expert_and_router_parameter_gets_a_gradient_and_the_base_none(name):
    model = adapted(name)
    model(**inputs_for(name)).logits.float().square().sum().backward()
    trained = 0
    for parameter_name, parameter in model.named_parameters():
        if "moelora_" in parameter_name:
            assert parameter.requires_grad
            assert torch.isfinite(parameter.grad).all()
            assert parameter.grad.count_nonzero() > 0, parameter_name
            trained += 1
        elif "modules_to_save" not in parameter_name:
            assert not parameter.requires_grad
            assert parameter.grad is None
    assert trained == 3 * ARCHITECTURES[name][2]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saved_and_loaded_again_it_gives_the_same_logits_to_the_bit(name, tmp_path):
    model = adapted(name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(name), tmp_path).eval()
    assert torch.equal(logits(loaded, name), logits(model, name))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_disabling_the_adapter_gives_the_base_to_the_bit(name):
    model = adapted(name)
    with model.disable_adapter():
        disabled = logits(model, name)
    assert torch.equal(disabled, logits(base(name), name))
    assert not torch.equal(logits(model, name), disabled)


@pytest.mark.parametrize("name", GENERATORS)
def test_it_generates(name):
    model = adapted(name)
    inputs = inputs_for(name, length=6)
    options = {"do_sample": False, "min_new_tokens": 5, "max_new_tokens": 5, "pad_token_id": 0}
    with_cache = model.generate(**inputs, **options)
    assert with_cache.shape == (2, 11)
    # Decoding token by token with the cache is the same as reading the whole sequence each time.
    assert torch.equal(with_cache, model.generate(**inputs, **options, use_cache=False))


class Int8Linear(nn.Module):
    """As quantisation libraries make it: features, an integer weight, a forward of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        quantised = (linear.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(quantised, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, (self.weight * self.scale).to(x.dtype))


def quantised_base() -> nn.Module:
    model = base("llama")
    for layer in model.model.layers:
        for name in ATTENTION:
            setattr(layer.self_attn, name, Int8Linear(getattr(layer.self_attn, name)))
    return model


def test_a_quantised_base_needs_only_its_forward(tmp_path):
    plain = logits(quantised_base(), "llama")
    config = config_for("llama")
    config.target_modules = set(ATTENTION)
    model = get_peft_model(quantised_base(), config).eval()
    set_every_expert_at_work(model)
    layers = moelora_layers(model)
    assert len(layers) == 8
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    model(**inputs_for("llama")).logits.sum().backward()
    assert all(p.grad.count_nonzero() > 0 for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        assert torch.equal(logits(model, "llama"), plain)
    assert not torch.equal(logits(model, "llama"), plain)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised_base(), tmp_path).eval()
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))
