"""Each sequence is decided about by an id that comes with it.

Shape suffixes: B sequences, T tokens, I in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...call import Call
from ...errors import ConfigError
from ...types import Rows
from .base import RouterInput, spread


class IdInput(RouterInput):
    """Rows are sequences, known by their id only, or one row where all have the same.

    Args:
        default: the id of sequences that come without one; None refuses them.
    """

    key: str
    name: str

    def __init__(self, *, default: int | None = None) -> None:
        if default is not None and (
            isinstance(default, bool) or not isinstance(default, int) or default < 0
        ):
            raise ConfigError(
                f"router_input_kwargs['default']={default!r} must be an integer of at least 0."
            )
        self.default = default

    def rows(self, x: Tensor, call: Call) -> Rows:
        """One row per sequence (of those packed into a row, each), or one for all.

        Raises:
            ConfigError: the call has no ids, or tokens that are not those of its sequences.
        """
        ids = self._ids(call)
        if ids is None:
            raise ConfigError(
                f"router_input={self.key!r} needs the id of each sequence; pass {self.name} to "
                f"the model's call, use moelora_plugin.routing_ids(model, {self.name}=...), or set "
                "router_input_kwargs={'default': 0}."
            )
        ids_N = ids.reshape(-1).to(x.device)
        tokens = x.shape[:-1].numel()
        documents = call.documents if ids.ndim else None
        if documents is not None and len(documents.of_T) == tokens:
            # `read_call` has seen to it that there is one for each.
            of_T = documents.of_T.to(x.device)
            return Rows(x=None, ids=ids_N, batch=documents.count, row_of_token=of_T)
        if ids.ndim and not self._has_sequences(x, call, len(ids)):
            raise ConfigError(
                f"router_input={self.key!r} has ids of {len(ids)} sequences, and a layer got an "
                f"input of shape {tuple(x.shape)} that is not made of them; name the layer in "
                "exclude_modules, or give one id for all sequences."
            )
        return Rows(
            x=None,
            ids=ids_N,
            batch=len(ids_N),
            row_of_token=spread(len(ids_N), tokens // len(ids_N), x.device),
        )

    def fixed_rows(self, call: Call) -> Rows | None:
        """The one row, where one id is set for all sequences."""
        ids = self._ids(call)
        return None if ids is None or ids.ndim else Rows(x=None, ids=ids.reshape(1))

    def _ids(self, call: Call) -> Tensor | None:
        ids = call.ids.get(self.name)
        return torch.tensor(self.default) if ids is None and self.default is not None else ids

    def _has_sequences(self, x: Tensor, call: Call, sequences: int) -> bool:
        if x.ndim == 2 and call.shape is not None:  # flat, or pooled to one row per sequence
            return len(x) in (sequences, sequences * call.shape[1])
        if x.ndim == 2:
            return sequences > 0 and len(x) % sequences == 0
        return x.shape[0] == sequences


class TaskInput(IdInput):
    """The task of each sequence, `task_id` (MOELoRA-medical, Poly)."""

    key, name = "task", "task_id"


class ClusterInput(IdInput):
    """The cluster of each sequence, `cluster_id` (MoCLE)."""

    key, name = "cluster", "cluster_id"
