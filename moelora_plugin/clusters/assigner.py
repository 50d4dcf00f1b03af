"""Clusters on disk, and the cluster of a new prompt.

A folder of clusters holds `clusters.safetensors` (the centroids) and `clusters.json` (the manifest:
method, seed, sizes, what tells the base from others).

Shape suffixes: N prompts, F features, C clusters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base_model import load_base_model
from ..errors import AdapterError, ConfigError
from ..families import name_of
from ..files import atomic_directory, sha256_of, write_json
from ..fingerprints import embedding_fingerprint, is_fingerprint, same_samples
from ..lookup import lookup
from .features import FEATURES, Features
from .prompts import Prompts, read_prompts

CENTROIDS_FILE = "clusters.safetensors"
MANIFEST_FILE = "clusters.json"


@dataclass(frozen=True)
class ClusterAssigner:
    """Prompts -> the nearest of the clusters (a hard assignment).

    Attributes:
        features: what prompts are compared by.
        centroids_CF: centre of each cluster, fp32.
        sizes: training prompts of each cluster.
        tokenizer: the base's; needed for texts only.
    """

    features: Features
    centroids_CF: Tensor
    sizes: tuple[int, ...]
    tokenizer: PreTrainedTokenizerBase | None = None

    def assign(
        self, source: Sequence[str] | Mapping[str, Any], *, batch_size: int = 8
    ) -> torch.LongTensor:
        """The cluster (N,) of each prompt: what models with the input "cluster" take as cluster_id.

        Args:
            source: texts, a batch, or the columns of examples; see `read_prompts`.
            batch_size: prompts at once through the base.

        Raises:
            ConfigError: texts without a tokenizer.
            DataError: a prompt is too short.
        """
        prompts: Prompts = read_prompts(source, self.tokenizer)
        distances_NC = torch.cdist(
            self.features(prompts, batch_size),
            self.centroids_CF,
            # The quick formula loses the digits that tell near centres apart.
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        nearest: torch.LongTensor = distances_NC.argmin(-1)  # type: ignore[assignment]
        return nearest

    def save(
        self, out: Path | str, *, manifest: Mapping[str, Any] | None = None, overwrite: bool = False
    ) -> Path:
        """Write the folder `out`: all of it, or nothing.

        Args:
            out: the folder to make.
            manifest: how the clusters came about; JSON values.
            overwrite: replace a folder that already holds something.

        Raises:
            ConfigError: `out` holds something and `overwrite` is False, or nobody has registered
                this kind of features.
        """
        method = name_of("features", type(self.features))
        with atomic_directory(out, overwrite=overwrite) as folder:
            save_file({"centroids": self.centroids_CF.contiguous()}, folder / CENTROIDS_FILE)
            write_json(
                folder / MANIFEST_FILE,
                {
                    **(manifest or {}),
                    "method": method,
                    "num_clusters": len(self.centroids_CF),
                    "seed": self.features.seed,
                    "sizes": list(self.sizes),
                    "base": self.features.base.name_or_path,
                    "base_fingerprint": embedding_fingerprint(self.features.base),
                    "centroids_sha256": sha256_of(folder / CENTROIDS_FILE),
                },
            )
        return Path(out)

    @classmethod
    def load(
        cls,
        path: Path | str,
        model: PreTrainedModel | PeftModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> ClusterAssigner:
        """Clusters from the folder `path`.

        Args:
            path: what `save` or `moelora cluster` has made.
            model: the base they were made with, an adapter on it or not; loaded where left out.
            tokenizer: the base's; needed for texts only.

        Raises:
            AdapterError: files are missing or damaged, or `model` is another base.
            ConfigError: the method is neither built in nor registered.
            MissingDependencyError: the base is to be loaded and is not there.
        """
        folder = Path(path)
        manifest = _read_manifest(folder)
        centroids_CF = _read_centroids(folder, manifest)
        model = load_base_model(manifest["base"]) if model is None else model
        features = lookup("features", manifest["method"], FEATURES)(model, manifest["seed"])
        found, expected = embedding_fingerprint(features.base), manifest["base_fingerprint"]
        if found and expected and not _are_same(found, expected):
            raise AdapterError(
                f"The clusters in {folder} were made with the base {manifest['base']!r}, which has "
                "other weights than this one; run `moelora cluster` again with this base."
            )
        return cls(features, centroids_CF, tuple(manifest["sizes"]), tokenizer)


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST_FILE
    if not file.is_file():
        raise AdapterError(
            f"{folder} holds no {MANIFEST_FILE}; name a folder of `moelora cluster`."
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        known = {"method", "seed", "sizes", "base", "base_fingerprint", "centroids_sha256"}
        if not known <= set(manifest):
            raise ConfigError(f"it lacks {sorted(known - set(manifest))[0]}")
        fingerprint = manifest["base_fingerprint"]
        if fingerprint is not None and not is_fingerprint(fingerprint, "shape"):
            raise ConfigError("base_fingerprint must have a shape and finite samples")
    except (UnicodeDecodeError, ValueError, TypeError) as error:
        raise AdapterError(f"{file} is damaged ({error}); run `moelora cluster` again.") from error
    found: dict[str, Any] = manifest
    return found


def _read_centroids(folder: Path, manifest: Mapping[str, Any]) -> Tensor:
    file = folder / CENTROIDS_FILE
    try:
        if sha256_of(file) != manifest["centroids_sha256"]:
            raise ValueError(f"its sha256 is not the one in {MANIFEST_FILE}")
        return load_file(file)["centroids"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise AdapterError(f"{file} is damaged ({error}); run `moelora cluster` again.") from error


def _are_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    return found["shape"] == expected["shape"] and same_samples(
        found["samples"], expected["samples"]
    )
