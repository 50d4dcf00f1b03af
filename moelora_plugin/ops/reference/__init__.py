"""The slow oracles: each method written as its paper writes it, with loops and autograd.

Nothing in the package calls these; tests hold every fast path to them, and `benchmarks/` times the
mixture as "how published code computes it".
"""

from __future__ import annotations

from .composition import (
    arrow_loop,
    concatenated,
    general_knowledge_subtracted,
    xlora_scalings_loop,
)
from .experts import (
    block_diagonal_terms,
    dora_terms,
    lora_terms,
    mixed_factor_terms,
    pool_terms,
    precondition_shared_loop,
    shared_a_terms,
    shared_b_terms,
    sum_of_terms,
    tensor_terms,
    tree_loop,
    vector_terms,
)
from .initialization import svd_updates_loop
from .losses import (
    column_sums_cv_squared_loop,
    contrastive_loop,
    cv_squared_loop,
    entropy_loop,
    lambda_sparsity_loop,
    localized_cv2_loop,
    orthogonal_loop,
    rsl_loop,
    switch_lb_loop,
    z_loop,
)
from .mixture import moe_lora_loop, precondition_loop, topk_softmax_loop
from .routers import (
    capacity_loop,
    expert_choice_loop,
    hard_loop,
    noisy_topk_loop,
    relu_loop,
    sigmoid_loop,
    sinkhorn_loop,
    softmax_loop,
    sparsegen_loop,
    threshold_loop,
    top_p_loop,
)
from .scores import (
    cosine_score_loop,
    embedding_score_loop,
    mlp_score_loop,
    multi_score_loop,
    pool_loop,
    prototype_score_loop,
    recurrent_score_loop,
    self_norm_score_loop,
    self_rank_score_loop,
)
from .sites import ReferenceLinear, block_loop, gated_linear_loop

__all__ = [
    "ReferenceLinear",
    "arrow_loop",
    "block_diagonal_terms",
    "block_loop",
    "capacity_loop",
    "column_sums_cv_squared_loop",
    "concatenated",
    "contrastive_loop",
    "cosine_score_loop",
    "cv_squared_loop",
    "dora_terms",
    "embedding_score_loop",
    "entropy_loop",
    "expert_choice_loop",
    "gated_linear_loop",
    "general_knowledge_subtracted",
    "hard_loop",
    "lambda_sparsity_loop",
    "localized_cv2_loop",
    "lora_terms",
    "mixed_factor_terms",
    "mlp_score_loop",
    "moe_lora_loop",
    "multi_score_loop",
    "noisy_topk_loop",
    "orthogonal_loop",
    "pool_loop",
    "pool_terms",
    "precondition_loop",
    "precondition_shared_loop",
    "prototype_score_loop",
    "recurrent_score_loop",
    "relu_loop",
    "rsl_loop",
    "self_norm_score_loop",
    "self_rank_score_loop",
    "shared_a_terms",
    "shared_b_terms",
    "sigmoid_loop",
    "sinkhorn_loop",
    "softmax_loop",
    "sparsegen_loop",
    "sum_of_terms",
    "svd_updates_loop",
    "switch_lb_loop",
    "tensor_terms",
    "threshold_loop",
    "top_p_loop",
    "topk_softmax_loop",
    "tree_loop",
    "vector_terms",
    "xlora_scalings_loop",
    "z_loop",
]
