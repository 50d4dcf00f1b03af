"""What prompts are clustered by. One class each, one line in `FEATURES`.

Shape suffixes: N prompts, S positions, F features, I in, O out, r rank, H hidden, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import tqdm

from ..errors import ConfigError
from .prompts import Prompts, pad


class Features(ABC):
    """Prompts -> one unit vector each.

    The base alone decides: an adapter on it is switched off meanwhile, so that a prompt's cluster
    is the same before, during and after training.

    Args:
        model: the base, or a PeftModel around it.
        seed: of what is drawn at random.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, seed: int = 0) -> None:
        self.model = model
        self.base = cast(
            PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model
        )
        self.seed = seed

    @abstractmethod
    def compute(self, ids_NS: Tensor, mask_NS: Tensor) -> Tensor:
        """Features (N, F) of right-padded prompts, fp32, of any length."""

    def __call__(self, prompts: Prompts, batch_size: int = 8) -> Tensor:
        """Unit vectors (N, F) in fp32 on the CPU.

        Args:
            prompts: their token ids.
            batch_size: prompts at once.
        """
        starts: Sequence[int] = range(0, len(prompts), batch_size)
        if len(starts) > 1:
            starts = tqdm(starts, desc="Reading prompts")
        with self._base_alone():
            parts = [
                self.compute(*pad(prompts[start : start + batch_size], self.base.device)).cpu()
                for start in starts
            ]
        return nn.functional.normalize(torch.cat(parts), dim=-1)

    @contextmanager
    def _base_alone(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        plain = self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext()
        try:
            with plain:
                yield
        finally:
            self.model.train(was_training)


class EmbeddingFeatures(Features):
    """The mean of the base's last hidden states over the prompt.

    MoCLE (arXiv 2312.12379) embeds the instruction with a sentence encoder of its own; the base
    needs no further model.
    """

    @torch.no_grad()
    def compute(self, ids_NS: Tensor, mask_NS: Tensor) -> Tensor:
        """Means (N, H)."""
        decoder = self.base.base_model  # without the head, whose logits nobody reads
        output = decoder(input_ids=ids_NS, attention_mask=mask_NS, use_cache=False)
        hidden_NSH = output.last_hidden_state.float() * mask_NS[..., None]
        return cast(Tensor, hidden_NSH.sum(1) / mask_NS.sum(1, keepdim=True))


class GradientFeatures(Features):
    """The direction in which a prompt would move LoRA factors (ELREA, arXiv 2502.00089).

    The loss is the language-modelling loss on the prompt itself, as in the paper: an answer is not
    there at inference. The factors are those of a LoRA on the modules that PEFT's LoRA adapts by
    default, with A drawn from the seed and B = 0: A's gradient is then zero, and B's is
    sum_t d_t (A x_t)^T with d_t the gradient of the module's output, which hooks collect for every
    prompt of a batch in one backward pass. It is projected to `width` numbers by a sparse random
    projection with one entry of +-1 in each column (a count sketch), whose inner products are right
    on average and within about 1 / sqrt(width).

    The paper takes Adam's update directions at an adapter that was trained on everything first, and
    projects to more dimensions; here nothing needs to be trained before.

    numpy's RandomState is frozen by its policy (NEP 19), so the seed stands for what is drawn.
    """

    rank = 4
    width = 512

    def __init__(self, model: PreTrainedModel | PeftModel, seed: int = 0) -> None:
        super().__init__(model, seed)
        self.modules = lora_targets(self.base)
        if not self.modules:
            raise ConfigError(
                f"{type(self.base).__name__} has no linear module to take gradients at; use method "
                "embedding."
            )
        self._drawn: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def compute(self, ids_NS: Tensor, mask_NS: Tensor) -> Tensor:
        """Projected gradients (N, F)."""
        # What depends on it are the modules' outputs, so a backward pass to it meets their hooks,
        # whatever of the base trains.
        anchor = torch.zeros((), requires_grad=True)
        features_NF = torch.zeros(len(ids_NS), self.width)
        handles = [
            module.register_forward_hook(_Tap(self, number, anchor, features_NF))
            for number, module in enumerate(self.modules)
        ]
        try:
            with torch.enable_grad():
                logits_NSV = self.base(
                    input_ids=ids_NS, attention_mask=mask_NS, use_cache=False
                ).logits
                targets_NS = ids_NS.masked_fill(mask_NS == 0, -100)[:, 1:]
                # A sum, so that no prompt's gradient depends on how many others are in the batch.
                loss = nn.functional.cross_entropy(
                    logits_NSV[:, :-1].float().flatten(0, 1), targets_NS.flatten(), reduction="sum"
                )
                torch.autograd.grad(loss, anchor)
        finally:
            for handle in handles:
                handle.remove()
        return features_NF

    def draw(self, number: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
        """A (r, I), and where (O r,) and with which sign (O r,) an entry of B's gradient goes."""
        if number not in self._drawn:
            random = np.random.RandomState([self.seed, number])
            a_rI = random.standard_normal((self.rank, inputs)) / inputs**0.5
            entry = random.randint(self.width, size=outputs * self.rank)
            sign = random.randint(2, size=outputs * self.rank) * 2 - 1
            self._drawn[number] = (
                torch.from_numpy(a_rI).float(),
                torch.from_numpy(entry),
                torch.from_numpy(sign).float(),
            )
        return self._drawn[number]


class _Tap:
    """A forward hook that adds a module's part to the features when its gradient comes."""

    def __init__(
        self, features: GradientFeatures, number: int, anchor: Tensor, features_NF: Tensor
    ) -> None:
        self.features = features
        self.number = number
        self.anchor = anchor
        self.features_NF = features_NF

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x_NSI = args[0].detach().float()
        if x_NSI.ndim != 3:  # an expert of a base that is itself a mixture sees tokens, not prompts
            return output
        sizes = x_NSI.shape[-1], output.shape[-1]
        a_rI, entry, sign = self.features.draw(self.number, *sizes)
        z_NSr = x_NSI @ a_rI.T.to(x_NSI.device)

        def collect(gradient_NSO: Tensor) -> None:
            # On the CPU, where adding up has one order.
            b_NOr = torch.einsum("nso,nsr->nor", gradient_NSO.float(), z_NSr).cpu()
            self.features_NF.index_add_(1, entry, b_NOr.flatten(1) * sign)

        output = output + self.anchor
        output.register_hook(collect)
        return output


def lora_targets(base: PreTrainedModel) -> list[nn.Module]:
    """The modules that PEFT's LoRA adapts by default, or all linears but the output's."""
    linears: dict[str, nn.Module] = {
        name.removesuffix(".base_layer"): module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    names = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(base.config.model_type, ())
    targets = [module for name, module in linears.items() if name.rpartition(".")[2] in names]
    head = base.get_output_embeddings()
    return targets or [module for module in linears.values() if module is not head]


FEATURES: dict[str, type[Features]] = {
    "embedding": EmbeddingFeatures,
    "gradient": GradientFeatures,
}
