"""Vision models: loaded with their processors, and adapted on language and vision linears."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import tiny_llama, tiny_tokenizer
from tiny_vision import VISION_MODELS, VOCABULARY, picture, save_tiny_vision, tiny_vision
from transformers import LlavaProcessor

from moelora_plugin import MoeLoraConfig, load_adapter, processors, save_adapter
from moelora_plugin.analysis import routing_statistics
from moelora_plugin.base_model import load_base_model, load_config, shows_images
from moelora_plugin.errors import ConfigError, MissingDependencyError
from moelora_plugin.model import moelora_layers
from moelora_plugin.processors import image_text, load_processor

# Linears outside of the language model: of the tower, and of what leads from it to the language.
SEEING = {"llava": 14, "qwen2_5_vl": 12, "idefics3": 13, "smolvlm": 13}
LANGUAGE = 14  # of the two decoder layers


def batch(processor: Any) -> dict[str, torch.Tensor]:
    """A row with one picture and a longer one with two, so that the first is padded."""
    image = image_text(processor)
    texts = [f"{image}\nWhat is it? yes", f"{image} or {image}, which sentence is positive? no"]
    images = [[picture("red")], [picture("blue", 40, 20), picture("green")]]
    encoding = processor(text=texts, images=images, padding=True, return_tensors="pt")
    labels = encoding["input_ids"].masked_fill(encoding["attention_mask"] == 0, -100)
    return {**encoding, "labels": labels}


def adapted(model: Any, targets: Any = "all-linear", **keys: Any) -> PeftModel:
    torch.manual_seed(1)
    config = MoeLoraConfig(
        r=2, num_experts=3, top_k=2, target_modules=targets, lora_dropout=0.0, **keys
    )
    return get_peft_model(model, config).eval()


def set_to_work(model: PeftModel) -> PeftModel:
    torch.manual_seed(2)
    for layer in moelora_layers(model).values():
        for _, b in layer.expert_weights():
            b.normal_(std=0.3)
    return model


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", VISION_MODELS)
def test_model_and_processor_are_read_from_a_folder(name: str, tmp_path: Path) -> None:
    folder = save_tiny_vision(name, tmp_path)
    model, processor = tiny_vision(name)
    inputs = batch(processor)
    read = load_base_model(folder, device="cpu").eval()
    assert type(read) is type(model)
    assert shows_images(read)
    assert read.get_input_embeddings().weight.shape[0] == VOCABULARY  # more than tokens
    again = batch(load_processor(folder, load_config(folder)))
    assert list(again) == list(inputs)
    assert all(torch.equal(again[key], inputs[key]) for key in inputs)
    assert torch.equal(logits(read, again), logits(model, inputs))


@pytest.mark.parametrize("name", VISION_MODELS)
def test_a_processor_reaches_the_workers_of_a_data_loader(name: str) -> None:
    _, processor = tiny_vision(name)
    again = batch(pickle.loads(pickle.dumps(processor)))
    assert all(torch.equal(value, again[key]) for key, value in batch(processor).items())


def test_only_models_of_text_have_a_tokenizer(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = load_config(str(tmp_path))
    assert not shows_images(config)
    assert load_processor(str(tmp_path), config).encode("yes") == tiny_tokenizer().encode("yes")


def test_an_image_of_qwen_stands_between_its_marks() -> None:
    assert image_text(tiny_vision("qwen2_5_vl")[1]) == "<|vision_start|><|image_pad|><|vision_end|>"
    assert image_text(tiny_vision("llava")[1]) == "<image>"


def test_a_processor_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_vision("llava", tmp_path)
    config = load_config(folder)
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"holds a model but no processor .*change --base"):
        load_processor(folder, config)
    with pytest.raises(MissingDependencyError, match="'no/such' cannot be had from the hub"):
        load_processor("no/such", config)

    def without(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("\nLlavaProcessor requires the torchvision library.\nInstall it.\n")

    monkeypatch.setattr(LlavaProcessor, "from_pretrained", without)
    message = r"\(LlavaProcessor requires the torchvision library\); install what is missing\.$"
    with pytest.raises(MissingDependencyError, match=message):
        load_processor(folder, config)
    monkeypatch.setattr(processors, "is_vision_available", lambda: False)
    message = r"is a vision model, and images need Pillow, .* pip install .moelora\[vision\].\.$"
    with pytest.raises(MissingDependencyError, match=message):
        load_processor(folder, config)


@pytest.mark.parametrize("name", VISION_MODELS)
def test_language_and_vision_are_adapted_trained_and_switched_off(name: str) -> None:
    model, processor = tiny_vision(name)
    inputs = batch(processor)
    plain = logits(model, inputs)
    adapter = adapted(model)
    layers = moelora_layers(adapter)
    assert sum(layer.sees_images for layer in layers.values()) == SEEING[name]
    assert len(layers) == SEEING[name] + LANGUAGE
    assert torch.equal(logits(adapter, inputs), plain)  # B is zero: zero is added
    set_to_work(adapter).train()
    before = {key: p.detach().clone() for key, p in adapter.named_parameters() if p.requires_grad}
    trained = [p for p in adapter.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    adapter(**inputs).loss.backward()
    optimizer.step()
    after = dict(adapter.named_parameters())
    assert all(not torch.equal(after[key], value) for key, value in before.items())
    with adapter.eval().disable_adapter():
        assert torch.equal(logits(adapter, inputs), plain)
    assert not torch.allclose(logits(adapter, inputs), plain)


@pytest.mark.parametrize(
    ("name", "targets", "count"),
    [
        ("qwen2_5_vl", ["qkv", "q_proj"], 2 + 2),
        ("llava", ["q_proj", "linear_1"], 2 + 1 + 2),
        ("idefics3", r".*(vision_model|text_model).*\.v_proj", 2 + 2),
    ],
)
def test_targets_by_name_reach_both_halves(name: str, targets: Any, count: int) -> None:
    model, processor = tiny_vision(name)
    plain = logits(model, batch(processor))
    adapter = set_to_work(adapted(model, targets))
    assert len(moelora_layers(adapter)) == count
    assert not torch.allclose(logits(adapter, batch(processor)), plain)


@pytest.mark.parametrize("name", VISION_MODELS)
def test_an_adapter_comes_back_from_disk_with_its_processor(name: str, tmp_path: Path) -> None:
    base = save_tiny_vision(name, tmp_path / "base")
    adapter = set_to_work(adapted(load_base_model(base, device="cpu")))
    _, processor = tiny_vision(name)
    processor.tokenizer.model_max_length = 77
    folder = save_adapter(adapter, tmp_path / "adapter", tokenizer=processor)
    loaded, own = load_adapter(folder, device="cpu")
    assert own.tokenizer.model_max_length == 77
    assert torch.equal(logits(loaded, batch(own)), logits(adapter, batch(processor)))
    # Another program may save the tokenizer alone: what prepares images is the base's.
    (folder / "processor_config.json").unlink()
    loaded, bases = load_adapter(folder, device="cpu")
    assert bases.tokenizer.model_max_length != 77
    assert torch.equal(logits(loaded, batch(bases)), logits(adapter, batch(processor)))
    assert loaded.get_input_embeddings().weight.shape[0] == VOCABULARY


def test_an_adapter_of_a_base_without_a_processor_says_so(tmp_path: Path) -> None:
    base = save_tiny_vision("llava", tmp_path / "base")
    folder = save_adapter(adapted(load_base_model(base, device="cpu")), tmp_path / "adapter")
    (tmp_path / "base" / "processor_config.json").unlink()
    with pytest.raises(ConfigError, match="base holds a model but no processor"):
        load_adapter(folder, device="cpu")


def test_padding_of_the_text_masks_no_patch_of_an_image() -> None:
    """Also where there are as many patches as places in the text."""
    model, processor = tiny_vision("llava")
    adapter = set_to_work(adapted(model, aux_losses={"switch_lb": 0.01}))
    texts = ["<image><image>A", "<image><image>"]
    images = [[picture("red"), picture("blue")], [picture("green"), picture("pink")]]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    patches = 4 * (16 + 1)  # and a CLS token per image
    assert inputs["attention_mask"].numel() == patches
    assert int(inputs["attention_mask"].sum()) == patches - 1
    adapter.train()
    losses = []
    for mask in (inputs["attention_mask"], torch.ones_like(inputs["attention_mask"])):
        with routing_statistics(adapter) as statistics:
            adapter(**inputs | {"attention_mask": mask, "labels": inputs["input_ids"]})
        tokens = {name: counts.tokens for name, counts in statistics.layers.items()}
        tower = {count for name, count in tokens.items() if "vision_tower" in name}
        language = {count for name, count in tokens.items() if "language_model" in name}
        assert (tower, language) == ({patches}, {int(mask.sum())})
        losses.append(
            {
                name: layer.last_aux_losses["default"]["switch_lb"].item()
                for name, layer in moelora_layers(adapter).items()
            }
        )
    masked, unmasked = losses
    for name, value in masked.items():
        assert (value == unmasked[name]) == ("language_model" not in name), name


def test_a_configuration_without_a_vision_tower_is_one_of_text() -> None:
    adapter = adapted(tiny_llama())
    assert not any(layer.sees_images for layer in moelora_layers(adapter).values())
