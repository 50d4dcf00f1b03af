"""The slow oracles: each method written as its paper writes it, with loops and autograd.

Nothing in the package calls these; tests hold every fast path to them, and `benchmarks/` times the
mixture as "how published code computes it".
"""

from __future__ import annotations

from .mixture import moe_lora_loop, precondition_loop, topk_softmax_loop

__all__ = ["moe_lora_loop", "precondition_loop", "topk_softmax_loop"]
