"""What the base's own files hold, so that a merged checkpoint holds the same but for the adapter.

Checkpoints mix dtypes: DeepSeek-V3 and GLM-4-MoE are bfloat16 with routing biases in float32, which
one dtype for the whole model would round.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

_NAMES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class BaseFiles:
    """The tensors of a checkpoint by name, read when asked for.

    Attributes:
        dtypes: of each tensor; empty where the base is in no such files.
        readers: give each tensor.
    """

    dtypes: Mapping[str, torch.dtype]
    readers: Mapping[str, Callable[[], Tensor]]

    @classmethod
    def of(cls, base: str, revision: str | None = None) -> BaseFiles:
        """Those of a folder, or of a hub id that has just been loaded from the cache."""
        folder = Path(base)
        if not folder.is_dir():
            folder = Path(snapshot_download(base, revision=revision, local_files_only=True))
        dtypes: dict[str, torch.dtype] = {}
        readers: dict[str, Callable[[], Tensor]] = {}
        for file in _weight_files(folder):
            if file.suffix == ".bin":
                for key, value in torch.load(file, weights_only=True, mmap=True).items():
                    dtypes[key], readers[key] = value.dtype, partial(_itself, value)
                continue
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    # Of no rows, a slice has the dtype and reads nothing.
                    part = opened.get_slice(key)
                    empty = part[:0] if part.get_shape() else opened.get_tensor(key)
                    dtypes[key], readers[key] = empty.dtype, partial(_read, file, key)
        return cls(dtypes, readers)

    @property
    def main_dtype(self) -> torch.dtype | None:
        """The floating-point dtype that most tensors have."""
        floating = Counter(dtype for dtype in self.dtypes.values() if dtype.is_floating_point)
        return max(floating, key=lambda dtype: floating[dtype]) if floating else None

    def of_other_dtype(self, always_wide: set[str]) -> frozenset[str]:
        """The floating-point tensors in another dtype than most.

        Args:
            always_wide: parts of names that are kept in float32 whatever the others have.
        """
        return frozenset(
            key
            for key, dtype in self.dtypes.items()
            if dtype.is_floating_point
            and (dtype != self.main_dtype or any(part in key for part in always_wide))
        )


def restore_dtypes(
    folder: Path, base: BaseFiles, keys: frozenset[str], wide: Mapping[str, Tensor]
) -> None:
    """Give tensors of a written checkpoint the dtypes of their originals.

    One that the adapter has left alone becomes its original, bit for bit.

    Args:
        folder: the checkpoint, in one dtype.
        base: what it was made from.
        keys: the tensors.
        wide: those of them, before they were rounded, that may have been changed.
    """
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        chosen = keys & tensors.keys()
        for key in chosen:
            original, written = base.readers[key](), tensors[key]
            rounded = original.to(torch.float32).to(written.dtype)
            if original.shape == written.shape and torch.equal(rounded, written):
                tensors[key] = original
            else:
                tensors[key] = wide.get(key, written).to(original.dtype).contiguous()
        if chosen:
            save_file(tensors, file, metadata={"format": "pt"})


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads, safetensors first."""
    for name in _NAMES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return sorted(folder / one for one in names)
    return []


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _read(file: Path, key: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(key)
    return tensor
