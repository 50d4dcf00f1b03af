"""A language model and a tokenizer small enough to build anew in every test."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

# What the byte-level BPE learns its merges from: words that the prompts use, so that answers such
# as " positive" come out as one token, as they do with real tokenizers.
CORPUS = (
    "### Instruction: ### Input: ### Response: Question: Context: Sentence: Options: Comment:",
    "Choose the option that answers the question. The correct answer is A B C D E yes no",
    "The author's attitude is positive or negative about the film. positive negative",
    "The sentence is grammatically correct or wrong. correct wrong",
    "They are equivalent. They are not equivalent. The two sentences are equivalent in meaning.",
    "The relation is entailment, neutral or contradiction. entailment neutral contradiction",
    "Their similarity can be rated as 0 1 2 3 4 5, the resolution is correct, the text entails it.",
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 512 tokens that puts <s> first, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def tiny_llama(
    vocab_size: int = 512, hidden: int = 32, layers: int = 2, seed: int = 0
) -> LlamaForCausalLM:
    """A random Llama whose logits differ enough from token to token to rank answers."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,  # the usual 0.02 gives almost the same logit to every token
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def enable_checkpointing(model: PreTrainedModel, reentrant: bool = False) -> None:
    """Recompute each layer in the backward, by the name that transformers has for it (5.23 on)."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
