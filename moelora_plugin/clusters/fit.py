"""k-means over prompts.

Shape suffixes: N prompts, F features, C clusters.
"""

from __future__ import annotations

import torch

from ..errors import ConfigError, MissingDependencyError
from .assigner import ClusterAssigner
from .features import Features
from .prompts import Prompts


def fit_clusters(
    prompts: Prompts,
    features: Features,
    num_clusters: int,
    *,
    batch_size: int = 8,
) -> ClusterAssigner:
    """Cluster prompts: scikit-learn's k-means, the best of ten starts, on unit vectors.

    Args:
        prompts: their token ids, as `read_prompts` gives them.
        features: what they are compared by; its seed is the k-means' seed too.
        num_clusters: C.
        batch_size: prompts at once through the base.

    Raises:
        ConfigError: fewer different prompts than clusters.
        MissingDependencyError: scikit-learn is not installed.
    """
    require_scikit_learn()
    from sklearn.cluster import KMeans

    if num_clusters < 1:
        raise ConfigError(f"num_clusters={num_clusters} must be at least 1.")
    different = len({tuple(prompt) for prompt in prompts})
    if different < num_clusters:
        raise ConfigError(
            f"{num_clusters} clusters need as many different prompts, and the data has "
            f"{different}; lower --num-clusters or take more rows."
        )
    found_NF = features(prompts, batch_size)
    kmeans = KMeans(num_clusters, n_init=10, random_state=features.seed)
    labels = kmeans.fit_predict(found_NF.double().numpy())
    sizes = torch.bincount(torch.from_numpy(labels), minlength=num_clusters)
    return ClusterAssigner(
        features, torch.from_numpy(kmeans.cluster_centers_).float(), tuple(sizes.tolist())
    )


def require_scikit_learn() -> None:
    """Say what is missing before any time is spent.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "Clustering needs scikit-learn; install it with `pip install moelora[cluster]`."
        ) from error
