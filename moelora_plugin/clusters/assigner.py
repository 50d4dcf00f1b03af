"""Clusters on disk, and the cluster of a new prompt.

A folder of clusters holds `clusters.safetensors` (the centroids) and `clusters.json` (the manifest:
method, seed, sizes, what tells the base from others).

Shape suffixes: N prompts, F features, C clusters.
"""

from __future__ import annotations

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
from ..errors import AdapterError, ConfigError, first_line
from ..families import name_of
from ..files import atomic_directory, sha256_of, write_json
from ..fingerprints import embedding_fingerprint, is_fingerprint, same_samples
from ..lookup import lookup
from ..reading import read_json
from ..schema import from_mapping, require, written_by
from .features import FEATURES, Features
from .prompts import Prompts, read_prompts

CENTROIDS_FILE = "clusters.safetensors"
MANIFEST_FILE = "clusters.json"


@dataclass(frozen=True)
class _Manifest:
    """What the loader relies on of `clusters.json`."""

    method: str
    seed: int
    sizes: list[int]
    base: str
    base_fingerprint: dict[str, Any] | None
    centroids_sha256: str


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
            AdapterError: the clusters were made with another base.
            ConfigError: texts without a tokenizer.
            DataError: a prompt is too short.
        """
        prompts: Prompts = read_prompts(source, self.tokenizer)
        features_NF = self.features(prompts, batch_size)
        if features_NF.shape[1] != self.centroids_CF.shape[1]:
            raise AdapterError(
                f"The clusters' centroids have {self.centroids_CF.shape[1]} features and prompts "
                f"have {features_NF.shape[1]}; run `moelora cluster` again with this base."
            )
        distances_NC = torch.cdist(
            features_NF,
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
    if not file.exists():
        raise AdapterError(
            f"{folder} holds no {MANIFEST_FILE}; name a folder of `moelora cluster`."
        )
    content = read_json(file, remedy="run `moelora cluster` again", error=AdapterError)
    source = written_by("moelora cluster")
    try:
        found = from_mapping(_Manifest, content, source=source)
        numbers = all(size >= 0 for size in found.sizes)
        require(bool(found.sizes) and numbers, "sizes", found.sizes, "numbers of prompts", source)
        require(0 <= found.seed < 2**63, "seed", found.seed, "a seed", source)
        fingerprint = found.base_fingerprint
        right = fingerprint is None or is_fingerprint(fingerprint, "shape")
        expected = "a shape and finite samples"
        require(right, "base_fingerprint", fingerprint, expected, source)
    except ConfigError as error:
        raise AdapterError(f"{file} is damaged: {error}") from error
    return content


def _read_centroids(folder: Path, manifest: Mapping[str, Any]) -> Tensor:
    file = folder / CENTROIDS_FILE
    try:
        if not file.is_file():
            raise ValueError("it is no file")
        if sha256_of(file) != manifest["centroids_sha256"]:
            raise ValueError(f"its sha256 is not the one in {MANIFEST_FILE}")
        centroids_CF = load_file(file)["centroids"]
        if centroids_CF.dtype != torch.float32 or centroids_CF.dim() != 2:
            raise ValueError(f"its centroids are {centroids_CF.dim()}-D of {centroids_CF.dtype}")
        if len(centroids_CF) != len(manifest["sizes"]):
            raise ValueError(f"it has {len(centroids_CF)} centroids for {len(manifest['sizes'])}")
        if not centroids_CF.isfinite().all():
            raise ValueError("not all of its values are finite")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        reason = first_line(error)
        raise AdapterError(f"{file} is damaged ({reason}); run `moelora cluster` again.") from error
    return centroids_CF


def _are_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    return found["shape"] == expected["shape"] and same_samples(
        found["samples"], expected["samples"]
    )
