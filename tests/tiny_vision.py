"""Vision models small enough to build anew in every test, each with its processor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny import tiny_tokenizer
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from moelora_plugin.processors import _processor_class

VOCABULARY = 560  # more rows than the tokenizer has tokens, as real checkpoints pad theirs
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,  # the usual 0.02 gives almost the same logit to every token
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}
SIDE = 16  # of an image, in pixels, where the processor has one size
PATCH = 4


def tiny_vision(name: str, seed: int = 0) -> tuple[Any, Any]:
    """A random model and its processor: "llava", "qwen2_5_vl", "idefics3" or "smolvlm"."""
    torch.manual_seed(seed)
    model, processor = VISION_MODELS[name]()
    return model.eval(), processor


def save_tiny_vision(name: str, folder: Path) -> str:
    """A model and its processor as a checkpoint on disk."""
    model, processor = tiny_vision(name)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def picture(colour: str, width: int = 24, height: int = 20) -> Image.Image:
    """A picture in one colour with a black corner."""
    image = Image.new("RGB", (width, height), colour)
    image.paste("black", (0, 0, width // 3, height // 2))
    return image


def _tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """The tests' own tokenizer with further special tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def _llava() -> tuple[Any, Any]:
    tokenizer = _tokenizer("<image>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH),
        text_config=LlamaConfig(**TEXT),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        ),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return LlavaForConditionalGeneration(config), processor


def _qwen2_5_vl() -> tuple[Any, Any]:
    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = _tokenizer(*names)
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(names))
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "window_size": 2 * 2 * PATCH,
            "fullatt_block_indexes": [1],
            "out_hidden_size": TEXT["hidden_size"],
            "initializer_range": 0.3,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=2,
        size={"shortest_edge": 8 * 8, "longest_edge": 24 * 24},
    )
    return (
        Qwen2_5_VLForConditionalGeneration(config),
        _processor_class(config)(images, tokenizer),
    )


def _idefics3(
    config_class: Callable[..., Any] = Idefics3Config,
    model_class: Callable[..., Any] = Idefics3ForConditionalGeneration,
) -> tuple[Any, Any]:
    special = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
    tokenizer = _tokenizer(
        *special, *(f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 4))
    )
    config = config_class(
        text_config=LlamaConfig(**TEXT),
        vision_config=VISION | {"image_size": SIDE, "patch_size": PATCH},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=TEXT["pad_token_id"],
        scale_factor=2,
    )
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
    )
    sequence = (SIDE // PATCH) ** 2 // 4
    return model_class(config), Idefics3Processor(images, tokenizer, image_seq_len=sequence)


VISION_MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": _llava,
    "qwen2_5_vl": _qwen2_5_vl,
    "idefics3": _idefics3,
    "smolvlm": lambda: _idefics3(SmolVLMConfig, SmolVLMForConditionalGeneration),
}
