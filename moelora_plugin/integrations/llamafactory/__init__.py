"""LLaMA-Factory: the classic trainers and v1."""
