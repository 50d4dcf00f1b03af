"""Which experts an adapter uses on a task, recorded while it is scored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..analysis import routing_statistics
from ..analysis.names import short_name
from ..model import routed_layers

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

# lm-eval scores log-likelihoods without an attention mask, and pads on the right with this id
# (lm_eval.models.utils_hf.pad_and_concat). A row that truly ends with it counts a token less.
PADDING_ID = 0
_DIGITS = 6

ExpertUse = dict[str, dict[str, Any]]


@contextmanager
def record_expert_use(lm: HFLM) -> Iterator[ExpertUse]:
    """Record which experts the model uses inside the block.

    Args:
        lm: lm-eval's view of the model.

    Yields:
        A dict that is filled when the block ends: by layer, in the base model's names, what
        `RoutingStatistics.to_dict` has, over every token that was read or written and is not
        padding. It stays empty without an active MoE-LoRA adapter. Where the rows are shared
        between processes, it is of all of them.
    """
    used: ExpertUse = {}
    if not routed_layers(lm.model):
        yield used
        return
    adapter = lm.model.active_adapters[0]
    with routing_statistics(lm.model, adapter, padding_id=PADDING_ID) as statistics:
        yield used
    counts = statistics.layers
    if lm.world_size > 1:
        from accelerate.utils import gather_object

        counts = {}
        for share in gather_object([statistics.layers]):
            for name, one in share.items():
                counts[name] = counts[name] + one if name in counts else one
    for name, one in counts.items():
        used[short_name(name)] = {key: _rounded(value) for key, value in one.summary().items()}


def _rounded(value: Any) -> Any:
    """To six digits: a model has hundreds of layers, and a file the numbers of many tasks."""
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return round(value, _DIGITS)
