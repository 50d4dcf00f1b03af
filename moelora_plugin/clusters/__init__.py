"""Clusters of training prompts, which cluster-routed adapters (MoCLE, ELREA) send to experts."""

from __future__ import annotations

from .assigner import ClusterAssigner
from .features import FEATURES, EmbeddingFeatures, Features, GradientFeatures
from .fit import fit_clusters, require_scikit_learn
from .prompts import read_prompts
from .rows import add_cluster_ids

__all__ = [
    "FEATURES",
    "ClusterAssigner",
    "EmbeddingFeatures",
    "Features",
    "GradientFeatures",
    "add_cluster_ids",
    "fit_clusters",
    "read_prompts",
    "require_scikit_learn",
]
