"""Expert kinds: what one expert's update is. One file each, one line in `EXPERTS`."""

from __future__ import annotations

from .base import ExpertKind, Tensors
from .block_diagonal import BlockDiagonalExperts
from .dora import DoraExperts
from .frozen_sparse_a import FrozenSparseAExperts
from .lora import LoraExperts
from .mixed_factors import MixedFactorExperts
from .pools import PoolExperts
from .rank import RankExperts
from .shared_a import SharedAExperts
from .shared_b import SharedBExperts
from .tensor import TensorExperts
from .tree import TreeExperts
from .vector import VectorExperts

EXPERTS: dict[str, type[ExpertKind]] = {
    "lora": LoraExperts,
    "shared_a": SharedAExperts,
    "shared_b": SharedBExperts,
    "rank": RankExperts,
    "frozen_sparse_a": FrozenSparseAExperts,
    "block_diagonal": BlockDiagonalExperts,
    "vector": VectorExperts,
    "tree": TreeExperts,
    "dora": DoraExperts,
    "mixed_factors": MixedFactorExperts,
    "pools": PoolExperts,
    "tensor": TensorExperts,
}

__all__ = ["EXPERTS", "ExpertKind", "LoraExperts", "Tensors"]
