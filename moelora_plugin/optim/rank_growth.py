"""DR-LoRA: the LoRA of each expert of a base that is itself a mixture starts small and grows.

DR-LoRA (Deng et al. 2026, arXiv 2601.04823). The adapter is one LoRA per base expert:

- experts that are modules: `MoeLoraConfig(num_experts=1, top_k=1, r=R_MAX, target_modules=...)`, or
  PEFT's LoRA;
- experts fused into one 3-D parameter, as transformers 5 has them for Mixtral, Qwen-MoE and most
  others: PEFT's `LoraConfig(r=R_MAX, target_parameters=["experts.gate_up_proj", ...])`, since a
  mixture of ours needs linear modules.

A rank that is not active yet has A_j = 0 and B_j = 0. Then both gradients are zero, every optimizer
leaves it there (weight decay too), a Riemannian metric does not see it, and what is saved or merged
holds it as zeros: no mask is needed, and which ranks are active can be read from A.

Shape suffixes: T tokens, K selected, E base experts, r rank, I in, O out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..call import read_call
from ..errors import ConfigError
from ..layers import MoeLoraLinear

_EXPERT = re.compile(r"((?:.*\.)?experts)(?:\.(?:expert_)?(\d+)\..*|(?:\.base_layer)*)")


@dataclass
class _Factors:
    """The LoRA of one base expert in one of its weights, as views of stacked tensors.

    Attributes:
        a: stacked A of all experts of the module (E r, I).
        b: stacked B (O, r E); PEFT has a rank's experts side by side.
        expert: which of them.
        experts: E; 1 where the expert is a module.
    """

    a: nn.Parameter
    b: nn.Parameter
    expert: int
    experts: int

    def rows(self, a: Tensor) -> Tensor:
        """This expert's A or its gradient (r, I)."""
        return a.view(self.experts, -1, a.shape[-1])[self.expert]

    def columns(self, b: Tensor) -> Tensor:
        """This expert's B or its gradient (O, r)."""
        return b.view(len(b), -1, self.experts)[..., self.expert]

    def importance(self) -> Tensor:
        """How much each rank's weights matter to the loss (r,): the mean of |weight * gradient|."""
        found = torch.zeros(len(self.rows(self.a)))
        for weight, view, dim in ((self.a, self.rows, 1), (self.b, self.columns, 0)):
            if weight.grad is not None:
                product = view(weight.detach().float()) * view(weight.grad.float())
                found += product.abs().mean(dim).cpu()
        return found


@dataclass
class _Layer:
    """One mixture of the base: for each of its experts the factors in all of its weights."""

    experts: dict[int, list[_Factors]] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)


class RankGrowth(TrainerCallback, ExportableState):
    """Grows the ranks of a base's experts while transformers' Trainer trains their LoRAs.

    At each update, for every base expert i of a layer,

        f_i <- beta f_i + (1 - beta) * share of the layer's tokens that the base routes to i
        g_i <- beta g_i + (1 - beta) * mean over i's active ranks of mean |weight * gradient|
        saliency_i = f_i g_i

    and every `interval` updates each layer's experts get ranks, one at a time, where
    saliency_i / (rank_i + 1)^penalty is largest, until the layer's mean rank is `target_rank`. The
    budget is spread evenly over the growths up to `until` of the training.

    From the paper's text known to us: growing from a small rank, the two signals and their product,
    the moving average, the layer budget of `target_rank` per expert. Ours: the average of g, the
    penalty, the even spreading, and the numbers below.

    Tokens are counted by hooks; padding is left out where the experts are fused. A LoRA scale of
    alpha / r takes the largest rank as r, whatever is active. Several processes count together.

    Args:
        init_rank: active ranks of every expert at the start.
        target_rank: mean active rank at the end; the adapter's `r` is the most one expert may have.
        interval: updates between two growths.
        until: the part of the training after which nothing grows.
        beta: of the moving averages.
        penalty: how much a rank that an expert has counts against it; with 0 the most salient
            expert is filled up first.
        seed: of the new ranks' A, which is drawn as LoRA's is; B starts at zero.

    Raises:
        ConfigError: a number out of range; when training starts, a model without such LoRAs.
    """

    def __init__(
        self,
        *,
        init_rank: int,
        target_rank: float,
        interval: int = 100,
        until: float = 0.5,
        beta: float = 0.9,
        penalty: float = 1.0,
        seed: int = 0,
    ) -> None:
        for key, value, good in (
            ("init_rank", init_rank, init_rank >= 1),
            ("target_rank", target_rank, target_rank >= init_rank),
            ("interval", interval, interval >= 1),
            ("until", until, 0 < until <= 1),
            ("beta", beta, 0 <= beta < 1),
            ("penalty", penalty, penalty >= 0),
        ):
            if not good:
                raise ConfigError(f"RankGrowth: {key}={value!r} is out of range; change {key}.")
        self.arguments = {
            "init_rank": init_rank,
            "target_rank": target_rank,
            "interval": interval,
            "until": until,
            "beta": beta,
            "penalty": penalty,
            "seed": seed,
        }
        self.init_rank, self.target_rank, self.interval = init_rank, target_rank, interval
        self.until, self.beta, self.penalty, self.seed = until, beta, penalty, seed
        # By layer, one value per expert: plain numbers, which a checkpoint keeps as JSON.
        self.frequency: dict[str, list[float]] = {}
        self.importance: dict[str, list[float]] = {}
        self._layers: dict[str, _Layer] = {}
        self._handles: list[RemovableHandle] = []
        self._real_T: Tensor | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        averages = {"frequency": self.frequency, "importance": self.importance}
        return {"args": self.arguments, "attributes": averages}

    def ranks(self) -> dict[str, list[int]]:
        """Active ranks of each expert, by layer."""
        return {
            name: [int(_active(factors[0]).sum()) for factors in layer.experts.values()]
            for name, layer in self._layers.items()
        }

    def attach(self, model: nn.Module) -> None:
        """Find the LoRAs of the base's experts and count the tokens that reach them.

        Raises:
            ConfigError: there are none, they are too small or too large, or they are sharded.
        """
        self._layers = _find(model)
        if not self._layers:
            raise ConfigError(
                "RankGrowth found no LoRA on an expert of the base; name the experts' linears in "
                "target_modules (with num_experts 1), or fused ones in LoraConfig's "
                "target_parameters."
            )
        largest = min(
            len(factors.rows(factors.a))
            for layer in self._layers.values()
            for expert in layer.experts.values()
            for factors in expert
        )
        if self.target_rank > largest:
            raise ConfigError(
                f"RankGrowth: target_rank={self.target_rank} is more than the adapter's "
                f"r={largest}; raise r, which is the most one expert may have."
            )
        self._handles = [model.register_forward_pre_hook(self._read_mask, with_kwargs=True)]
        for name, module in model.named_modules():
            match = _EXPERT.fullmatch(_clean(name))
            if match is None or match[1] not in self._layers:
                continue
            layer = self._layers[match[1]]
            if match[2] is None and _clean(name) == match[1]:
                hook: Any = partial(self._count_fused, layer)
            elif match[2] is not None and _is_first(module, layer, int(match[2])):
                hook = partial(self._count_module, layer, int(match[2]))
            else:
                continue
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        """Count no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def shrink(self) -> None:
        """Leave `init_rank` ranks of every expert."""
        for factors in self._all():
            factors.rows(factors.a)[self.init_rank :] = 0
            factors.columns(factors.b)[:, self.init_rank :] = 0

    @torch.no_grad()
    def observe(self) -> None:
        """Take an update's counts and gradients into the averages."""
        for name, layer in self._layers.items():
            counts = torch.tensor([float(layer.counts.get(i, 0)) for i in layer.experts])
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                device = next(self._all()).a.device
                counts = counts.to(device)
                torch.distributed.all_reduce(counts)
            layer.counts.clear()
            share = (counts / counts.sum().clamp(min=1)).tolist()
            importance = []
            for expert in layer.experts.values():
                ranks = torch.stack([factors.importance() for factors in expert]).mean(0)
                importance.append(float(ranks[_active(expert[0])].mean()))
            self.frequency[name] = self._averaged(self.frequency.get(name), share)
            self.importance[name] = self._averaged(self.importance.get(name), importance)

    @torch.no_grad()
    def grow(self, step: int, growths_left: int) -> None:
        """Give every layer its part of the budget.

        Args:
            step: the update, which the new ranks' A is drawn for.
            growths_left: growths to come, this one included.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        for name, layer in self._layers.items():
            experts = list(layer.experts.values())
            ranks = [int(_active(expert[0]).sum()) for expert in experts]
            missing = int(self.target_rank * len(experts)) - sum(ranks)
            saliency = [
                f * g for f, g in zip(self.frequency[name], self.importance[name], strict=True)
            ]
            for _ in range(math.ceil(missing / growths_left)):
                room = [i for i, e in enumerate(experts) if ranks[i] < len(_active(e[0]))]
                # Those of equal saliency (all, before anything was seen) grow in turn.
                chosen = max(
                    room,
                    key=lambda i: (saliency[i] / (ranks[i] + 1) ** self.penalty, -ranks[i]),
                )
                for factors in experts[chosen]:
                    row = factors.rows(factors.a)[ranks[chosen]]
                    bound = len(row) ** -0.5  # kaiming_uniform with a = sqrt(5), as LoRA's A
                    row.copy_((torch.rand(len(row), generator=generator) * 2 - 1) * bound)
                ranks[chosen] += 1

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Start small, unless the run resumes."""
        assert model is not None
        self.attach(model)
        if state.global_step == 0:
            self.shrink()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Read the gradients while they are there."""
        self.observe()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Grow, where it is time."""
        last = int(self.until * state.max_steps)
        if state.global_step % self.interval == 0 and state.global_step <= last:
            self.grow(state.global_step, (last - state.global_step) // self.interval + 1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Count no more."""
        self.detach()

    def _averaged(self, before: list[float] | None, now: list[float]) -> list[float]:
        before = before or [0.0] * len(now)
        return [self.beta * b + (1 - self.beta) * n for b, n in zip(before, now, strict=True)]

    def _all(self) -> Iterator[_Factors]:
        for layer in self._layers.values():
            for expert in layer.experts.values():
                yield from expert

    def _read_mask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            self._real_T = read_call(module, args, kwargs, {}).real_T

    def _count_fused(
        self, layer: _Layer, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> None:
        """Fused experts are called with the tokens and the experts that the router chose (T, K)."""
        if not (module.training and torch.is_grad_enabled()):
            return
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        ids_TK = next(value for value in given if not value.is_floating_point())
        if self._real_T is not None and len(self._real_T) == len(ids_TK):
            ids_TK = ids_TK[self._real_T]
        for expert, count in enumerate(ids_TK.flatten().bincount(minlength=1).tolist()):
            layer.counts[expert] = layer.counts.get(expert, 0) + count

    def _count_module(
        self, layer: _Layer, expert: int, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> None:
        """An expert that is a module is called with its tokens alone."""
        if module.training and torch.is_grad_enabled():
            x: Tensor = args[0]
            layer.counts[expert] = layer.counts.get(expert, 0) + x.numel() // x.shape[-1]


def _active(factors: _Factors) -> Tensor:
    """Which ranks have started (r,)."""
    return factors.rows(factors.a.detach()).ne(0).any(-1).cpu()


def _is_first(module: nn.Module, layer: _Layer, expert: int) -> bool:
    """Whether the module is the first adapted one of the expert, which all of its tokens pass."""
    factors = _factors(module)
    return factors is not None and factors[0] is layer.experts[expert][0].a


def _clean(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _find(model: nn.Module) -> dict[str, _Layer]:
    layers: dict[str, _Layer] = {}
    for name, module in model.named_modules():
        match, found = _EXPERT.fullmatch(_clean(name)), _factors(module)
        if match is None or found is None:
            continue
        a, b, experts = found
        if hasattr(a, "full_tensor") or not a.numel():
            raise ConfigError(
                "RankGrowth needs the experts' LoRAs whole on every process; train with DDP, not "
                "with sharded parameters."
            )
        layer = layers.setdefault(match[1], _Layer())
        for index in range(experts):
            expert = index if match[2] is None else int(match[2])
            layer.experts.setdefault(expert, []).append(_Factors(a, b, index, experts))
    return {name: _Layer(dict(sorted(layer.experts.items()))) for name, layer in layers.items()}


def _factors(module: nn.Module) -> tuple[nn.Parameter, nn.Parameter, int] | None:
    """The trained A and B of an adapted module, and of how many base experts they are."""
    if isinstance(module, MoeLoraLinear):
        adapter = module.active_adapters[0]
        if adapter not in module.moelora_mixture:
            return None
        if module.moelora_mixture[adapter].plan.num_experts != 1:
            raise ConfigError(
                "RankGrowth needs one LoRA for each expert of the base; set num_experts and top_k "
                "to 1."
            )
        tensors = module.tensors(adapter)
        return cast(nn.Parameter, tensors["A"]), cast(nn.Parameter, tensors["B"]), 1
    if isinstance(module, LoraLayer) and module.active_adapters[0] in module.lora_A:
        adapter = module.active_adapters[0]
        a = cast(nn.Parameter, module.lora_A[adapter].weight)
        b = cast(nn.Parameter, module.lora_B[adapter].weight)
        return a, b, int(getattr(module, "num_experts", 1))
    return None
