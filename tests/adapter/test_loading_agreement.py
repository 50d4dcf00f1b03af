"""`load_adapter` gives bitwise the model of `PeftModel.from_pretrained`, or one sentence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from preset_cases import base as preset_base
from preset_cases import grown, ids_of, toy_batch
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from moelora_plugin import PRESETS, MoeLoraConfig, load_adapter, save_adapter
from moelora_plugin.errors import AdapterError, ConfigError

IDS = torch.arange(3, 27).view(2, 12)
# PEFT's own remarks on what some kinds do; none is about what is loaded.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True."),
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),
    # PEFT's prefix tuning calls transformers 5.24 by the cache's old name.
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
]


def ours(**keys: Any) -> MoeLoraConfig:
    settings = {"r": 2, "num_experts": 3, "top_k": 2, "target_modules": ["q_proj", "v_proj"]}
    return MoeLoraConfig(task_type="CAUSAL_LM", **{**settings, **keys})


def lora(**keys: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", **{"r": 2, "target_modules": ["q_proj"], **keys})


HEAD, EMBEDDING = ["q_proj", "lm_head"], ["q_proj", "embed_tokens"]
KINDS: dict[str, Callable[[], PeftConfig]] = {
    "head": lambda: ours(target_modules=HEAD),
    "head saved whole": lambda: ours(modules_to_save=["lm_head"]),
    "both saved whole": lambda: ours(modules_to_save=["lm_head", "embed_tokens"]),
    "norms saved whole": lambda: ours(modules_to_save=["norm"]),
    "biases": lambda: ours(bias="all"),
    "some tokens": lambda: ours(trainable_token_indices=[3, 5]),
    "offsets": lambda: ours(init="segments", num_experts=2),
    "frozen factors": lambda: ours(expert="frozen_sparse_a"),
    "LoRA": lora,
    "LoRA on the head": lambda: lora(target_modules=HEAD),
    "LoRA on embeddings": lambda: lora(target_modules=EMBEDDING),
    "LoRA with some tokens": lambda: lora(trainable_token_indices=[3, 5]),
    "LoRA from pissa": lambda: lora(init_lora_weights="pissa"),
    "LoRA from olora": lambda: lora(init_lora_weights="olora"),
    "LoRA on repeated layers": lambda: lora(layer_replication=[[0, 2], [1, 2]]),
    "DoRA": lambda: lora(use_dora=True),
    "AdaLoRA": lambda: AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=10
    ),
    "IA3": lambda: IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]
    ),
    "VeRA": lambda: VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "VBLoRA": lambda: VBLoRAConfig(
        r=4, target_modules=["q_proj"], vector_length=8, num_vectors=8, task_type="CAUSAL_LM"
    ),
    "norms": lambda: LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "tokens": lambda: TrainableTokensConfig(
        token_indices=[1, 2], target_modules=["embed_tokens"], task_type="CAUSAL_LM"
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One with input and output embeddings of its own, one that ties them; both have biases."""
    folder = tmp_path_factory.mktemp("bases")
    for name in ("untied", "tied"):
        config = tiny_llama(hidden=16).config
        config.attention_bias, config.tie_word_embeddings = True, name == "tied"
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return {name: folder / name for name in ("untied", "tied")}


def load_base(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def trained(base: Any, config: PeftConfig, name: str = "default") -> PeftModel:
    """All that trains has moved."""
    torch.manual_seed(1)
    model = get_peft_model(base, config, adapter_name=name).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def logits(model: Any, **ids: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **ids).logits


# On bases that tie their embeddings only what touches these differs; PEFT's pissa and olora refuse
# float64.
TIED = [kind for kind in KINDS if any(part in kind for part in ("head", "token", "embed", "both"))]
CASES = [
    *((kind, "untied", torch.float32) for kind in KINDS),
    *((kind, "tied", torch.float32) for kind in TIED),
    *((kind, "untied", torch.float64) for kind in list(KINDS)[:9]),
    *((kind, "untied", torch.bfloat16) for kind in ("head", "both saved whole", "LoRA from olora")),
]


@pytest.mark.parametrize(("kind", "tied", "dtype"), CASES, ids=str)
def test_both_loaders_answer_alike(
    kind: str, tied: str, dtype: torch.dtype, bases: dict[str, Path], tmp_path: Path
) -> None:
    model = trained(load_base(bases[tied], dtype), KINDS[kind]())
    expected = logits(model)
    save_adapter(model, tmp_path / "adapter")
    by_peft = PeftModel.from_pretrained(load_base(bases[tied], dtype), tmp_path / "adapter")
    by_us, _ = load_adapter(tmp_path / "adapter", base=load_base(bases[tied], dtype))
    assert torch.equal(logits(by_us), logits(by_peft))
    assert torch.equal(logits(by_us), expected)
    assert not any(parameter.is_meta for parameter in by_us.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_both_loaders_answer_alike_for_every_preset(name: str, tmp_path: Path) -> None:
    grown(name).save_pretrained(tmp_path)

    def answers(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=toy_batch()["input_ids"], **ids_of(name)).logits

    by_peft = PeftModel.from_pretrained(preset_base(), tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    by_us, _ = load_adapter(tmp_path, base=preset_base())
    assert torch.equal(answers(by_us), answers(by_peft))


def test_the_adapter_s_name_makes_no_difference(bases: dict[str, Path], tmp_path: Path) -> None:
    config = ours(target_modules=HEAD, modules_to_save=["norm"])
    model = trained(load_base(bases["untied"]), config, name="mine")
    save_adapter(model, tmp_path / "adapter")
    by_us, _ = load_adapter(tmp_path / "adapter", device="cpu")
    assert torch.equal(logits(by_us), logits(model))


@pytest.mark.parametrize("keys", [{}, {"target_modules": HEAD}, {"modules_to_save": ["lm_head"]}])
def test_a_resized_vocabulary(keys: Any, bases: dict[str, Path], tmp_path: Path) -> None:
    def resized() -> Any:
        base = load_base(bases["untied"])
        base.resize_token_embeddings(520, mean_resizing=False)
        return base

    model = trained(resized(), ours(**keys))
    save_adapter(model, tmp_path / "adapter")
    loaded, _ = load_adapter(tmp_path / "adapter", base=resized())
    by_peft = PeftModel.from_pretrained(resized(), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(by_peft), logits(model))
    # Both refuse the base as it was; we say the sizes and what to do, in a sentence.
    with pytest.raises(RuntimeError, match=r"size mismatch|lm_head"):
        PeftModel.from_pretrained(load_base(bases["untied"]), tmp_path / "adapter")
    with pytest.raises(AdapterError) as caught:
        load_adapter(tmp_path / "adapter", device="cpu")
    message = str(caught.value)
    assert "520" in message
    assert "512" in message
    assert message.endswith("resized as it was then (resize_token_embeddings).")
    assert "\n" not in message


@pytest.mark.parametrize("kind", ["some tokens", "LoRA with some tokens"])
@pytest.mark.parametrize("tied", ["untied", "tied"])
def test_rows_of_the_embeddings_come_off_and_merge(
    kind: str, tied: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    config = KINDS[kind]()
    if isinstance(config, MoeLoraConfig):
        config.num_experts = config.top_k = 1
    model = trained(load_base(bases[tied]), config)
    save_adapter(model, tmp_path / "adapter")
    expected = logits(model)
    base = load_adapter(tmp_path / "adapter", device="cpu")[0].unload()
    assert torch.equal(logits(base), logits(load_base(bases[tied])))
    with warnings.catch_warnings():
        merged = load_adapter(tmp_path / "adapter", device="cpu")[0].merge_and_unload()
    # A merged weight is rounded once more, in fp32, on logits up to ten.
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-4)


def test_a_base_without_a_name(bases: dict[str, Path], tmp_path: Path) -> None:
    model = trained(tiny_llama(hidden=16), ours())
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ConfigError, match="has no name, has a tokenizer or processor; save it"):
        load_adapter(tmp_path / "adapter", base=tiny_llama(hidden=16))
    save_adapter(model, tmp_path / "adapter", tokenizer=tiny_tokenizer(), overwrite=True)
    loaded, _ = load_adapter(tmp_path / "adapter", base=tiny_llama(hidden=16))
    assert torch.equal(logits(loaded), logits(model))


def test_a_base_that_carries_an_adapter_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    model = trained(load_base(bases["untied"]), ours())
    save_adapter(model, tmp_path / "adapter")
    for base in (model, model.get_base_model()):
        with pytest.raises(ConfigError, match="carries an adapter already; unload it first"):
            load_adapter(tmp_path / "adapter", base=base)
    assert torch.equal(
        logits(load_adapter(tmp_path / "adapter", base=model.unload())[0]),
        logits(load_adapter(tmp_path / "adapter", device="cpu")[0]),
    )


def test_a_tensor_that_is_missing_is_named_whatever_holds_it(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    trained(load_base(bases["untied"]), ours(modules_to_save=["norm"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if "norm" in key)
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with pytest.raises(AdapterError, match=r"norm\.weight"):
        load_adapter(tmp_path, device="cpu")
