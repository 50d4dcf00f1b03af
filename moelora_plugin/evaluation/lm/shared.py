"""What our views of text models and of vision models have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import gather
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from ...base_model import load_base_model
from ...checkpoint import load_adapter
from ...errors import ConfigError
from ...processors import load_processor
from ..processes import launched
from ..request import AUTO
from .quiet import quiet

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
else:
    HFLM = object

# Tokens in a forward pass with the batch size "auto". More make a GPU no faster; on a CPU the
# logits (tokens times vocabulary) outgrow its caches much earlier.
_TOKENS = 16_384
_TOKENS_ON_CPU = 1_024


class SharedLM(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """Mixed into lm-eval's classes for models of transformers.

    Unlike those it takes an adapter with our strict loader and leaves the embeddings as they are,
    lets several processes share the rows of a model that was loaded before, and chooses a batch
    size without running the model for it.
    """

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Any = None,
        *,
        peft: str | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = AUTO,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        processes: PartialState | None = None,
    ) -> None:
        """Take a model in memory, or load one in each of the processes.

        Args:
            pretrained: the model, or folder or hub id of one.
            tokenizer: of a model in memory, its tokenizer or processor.
            peft: folder or hub id of an adapter for a model that is loaded.
            revision: of the model that is loaded: branch, tag or commit on the hub.
            dtype: of the model that is loaded: "auto" or a torch dtype's name.
            device: for the model that is loaded; None takes an accelerator where there is one.
            batch_size: rows per forward pass, or "auto".
            max_batch_size: the most rows that "auto" takes; None sets no limit.
            max_length: the most tokens of a row; None takes the model's own limit.
            processes: those that share the rows of a model in memory; None means it is alone.
        """
        loaded_from = pretrained if isinstance(pretrained, str) else None
        if loaded_from is not None:
            # What lm-eval's command line says where nobody has chosen; this machine may have none.
            device = None if device == "cuda:0" else device
            processes = launched(device)
            place = device if processes is None else str(processes.device)
            pretrained = load_base_model(loaded_from, revision=revision, dtype=dtype, device=place)
            if peft is None:
                tokenizer = load_processor(loaded_from, pretrained.config, revision=revision)
            else:
                pretrained, tokenizer = load_adapter(peft, base=pretrained)
        with quiet("lm_eval.models.huggingface"):  # warns that the model was not loaded by lm-eval
            super().__init__(
                pretrained=pretrained,
                tokenizer=copy.deepcopy(tokenizer),  # lm-eval sets a pad token where there is none
                batch_size=1 if batch_size == AUTO else batch_size,
                max_length=max_length,
                softmax_dtype="float32",  # in bf16 two answers would often tie
            )
        if loaded_from is not None:  # what lm-eval reports
            self.pretrained, self.peft, self.revision = loaded_from, peft, revision or "main"
        self._shows_bars = loaded_from is not None  # lm-eval's own command line has no others
        self.processes = processes
        if processes is not None:
            self._rank, self._world_size = processes.process_index, processes.num_processes
        self.advance: Callable[[float], None] = lambda share: None
        self._most_rows = max_batch_size
        self._tokens: int | None = None
        if batch_size == AUTO:
            self._tokens = _TOKENS_ON_CPU if self.device.type == "cpu" else _TOKENS

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Answer all rows in this process, as the others do too."""
        place = self._rank, self._world_size
        self._rank, self._world_size = 0, 1
        try:
            yield
        finally:
            self._rank, self._world_size = place

    def all_gather(self, tensor: Any) -> Any:
        """The tensors of all processes."""
        return tensor if self.world_size == 1 else gather(tensor)

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.processes is not None and self.world_size > 1:
            self.processes.wait_for_everyone()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        """The log-likelihood of each answer; `advance` is told of every one."""
        return self._answer(super().loglikelihood, requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        """What is written after each prompt; `advance` is told of every one."""
        # lm-eval limits the whole length, which a model's own number of new tokens would override.
        config = self.model.generation_config
        own, config.max_new_tokens = config.max_new_tokens, None
        try:
            return self._answer(super().generate_until, requests, disable_tqdm)
        finally:
            config.max_new_tokens = own

    def tokens_of(self, request: Instance) -> int:
        """How many tokens a request has, with those that may be written."""
        context, second, *_ = request.args
        if isinstance(second, str):
            return len(self.tok_encode(context + second))
        return len(self.tok_encode(context)) + int(second["max_gen_toks"])

    def _answer(
        self, method: Callable[..., Any], requests: list[Instance], disable_tqdm: bool
    ) -> Any:
        """Call one of lm-eval's methods with a batch size for which the memory is enough."""
        no_bars = disable_tqdm or not self._shows_bars
        self.cache_hook = _Finished(lambda: self.advance(1 / len(requests)))
        if self._tokens is None:
            return method(requests, disable_tqdm=no_bars)
        # Characters find the longest row well enough, without a second tokenisation of all.
        longest = self.tokens_of(max(requests, key=lambda request: len("".join(_texts(request)))))
        rows = max(1, min(self._tokens // longest, self._most_rows or len(requests)))
        while True:
            self.batch_size_per_gpu = rows
            try:
                # The longest rows come first: too large a batch fails before time is lost.
                return method(requests, disable_tqdm=no_bars)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                if rows == 1:
                    raise ConfigError(
                        f"A row of {longest} tokens does not fit into the memory of {self.device}; "
                        "pass --dtype bfloat16, or another --device."
                    ) from error
            clear_device_cache(garbage_collection=True)  # here, the failed pass is no longer held
            rows //= 2
            self._tokens = rows * longest


class _Finished:
    """Stands in for lm-eval's cache of answers, which is told of each that is there."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell

    def add_partial(self, *_: Any) -> None:
        """One more request is answered."""
        self._tell()


def _texts(request: Instance) -> list[str]:
    return [part for part in request.args if isinstance(part, str)]
