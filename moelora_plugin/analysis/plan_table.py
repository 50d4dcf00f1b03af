"""A plan for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group

from ..tables import PlainTable, plain_grid, shown

if TYPE_CHECKING:
    from .plan import AdapterPlan, Use

_UNKNOWN = "depends on the data"


def plan_table(plan: AdapterPlan) -> Group:
    """What is adapted, what trains, memory and operations beside the base's and LoRA's."""
    return Group(_facts(plan), _modules(plan), _comparison(plan), *_sentences(plan))


def _facts(plan: AdapterPlan) -> PlainTable:
    at, use = plan.at, plan.ours
    other = use.trainable - plan.expert_parameters - plan.router_parameters
    parts = [f"{plan.expert_parameters:,} in experts", f"{plan.router_parameters:,} in routers"]
    parts += [f"{other:,} elsewhere"] if other else []
    step = f"{at.optimizer}, {at.batch} x {at.length} = {at.tokens:,} tokens at once"
    step += f", autocast to {at.autocast}" if at.autocast else ""
    step += ", gradient checkpointing" if at.checkpointing else ""
    rows = {
        "base": f"{plan.base}, {plan.base_parameters:,} parameters in {plan.dtype}",
        "trainable": f"{use.trainable:,} parameters, {use.trainable / plan.base_parameters:.2%} of "
        f"the base's: {', '.join(parts)}",
        "not trained": f"{plan.frozen_entries:,} entries of the adapter",
        "step": step,
    }
    if not plan.frozen_entries:
        del rows["not trained"]
    table = plain_grid((0, 2))
    for name, value in rows.items():
        table.add_row(shown(name, "bold"), value)
    return table


def _modules(plan: AdapterPlan) -> PlainTable:
    """One line for all modules that got the same from the allocation."""
    names: dict[tuple[int, tuple[int, ...], int, str], list[str]] = {}
    for kind in plan.modules:
        key = (kind.count, kind.ranks, kind.top_k, kind.path)
        names.setdefault(key, []).append(kind.name)
    table = PlainTable(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("modules", overflow="fold")
    for column in ("of each", "experts", "top k", "ranks", "total rank", "path"):
        table.add_column(column, justify="right")
    for (number, ranks, top_k, path), kinds in names.items():
        table.add_row(
            ", ".join(kinds),
            str(number),
            str(len(ranks)),
            str(top_k),
            ", ".join(str(rank) for rank in sorted(set(ranks))),
            str(sum(ranks)),
            path,
        )
    return table


def _comparison(plan: AdapterPlan) -> PlainTable:
    tokens = plan.at.tokens
    rows: dict[str, Callable[[Use], str]] = {
        "weights": lambda use: size(use.weight_bytes),
        "gradients": lambda use: size(use.gradient_bytes),
        "optimizer state": lambda use: size(use.optimizer_bytes),
        "kept for the backward": lambda use: _known(use, lambda s: size(s.saved_bytes)),
        "in all, at the peak": lambda use: size(use.peak_bytes),
        "adapter's file": lambda use: size(use.file_bytes),
        "forward": lambda use: _known(use, lambda s: count(s.forward / tokens)),
        "forward and backward": lambda use: _known(use, lambda s: count(s.operations / tokens)),
        "relative to LoRA": lambda use: _ratio(plan, use),
    }
    table = PlainTable(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for column in ("base", "LoRA, same rank", "this adapter"):
        table.add_column(column, justify="right")
    for name, show in rows.items():
        if name == "weights":
            table.add_row(shown("Memory", "bold"))
        if name == "forward":
            table.add_row(shown("Operations per token", "bold"))
        alone = "" if name in ("in all, at the peak", "adapter's file") else show(plan.alone)
        table.add_row(f"  {name}", alone, show(plan.lora), show(plan.ours))
    return table


def _known(use: Use, show: Callable[..., str]) -> str:
    return _UNKNOWN if use.step is None else show(use.step)


def _ratio(plan: AdapterPlan, use: Use) -> str:
    if use.step is None or plan.lora.step is None:
        return _UNKNOWN
    return f"{use.step.operations / plan.lora.step.operations:.3f} x"


def _sentences(plan: AdapterPlan) -> list[str]:
    ours, lora, alone = plan.ours, plan.lora, plan.alone
    lines = []
    added = plan.added_activation_bytes
    if (
        added is not None
        and not plan.at.checkpointing
        and lora.step is not None
        and alone.step is not None
    ):
        lines.append(
            f"The adapter keeps {size(added / plan.at.tokens)} a token for the backward, LoRA "
            f"{size((lora.step.saved_bytes - alone.step.saved_bytes) / plan.at.tokens)}."
        )
    lines.append(
        "Decoding reads all weights for each new token: LoRA "
        f"{lora.weight_bytes / alone.weight_bytes:.3f} x, this adapter "
        f"{ours.weight_bytes / alone.weight_bytes:.3f} x the base's bytes."
    )
    if plan.preconditioning:
        line = f"Preconditioning takes {count(plan.preconditioning)} operations an optimizer step"
        if ours.step is not None:
            line += f", {plan.preconditioning / ours.step.operations:.2%} of the passes above"
        lines.append(f"{line}.")
    return [*lines, *plan.notes]


def size(number: float | None) -> str:
    """Bytes, in the largest unit of 1024 that leaves at least one."""
    if number is None:
        return _UNKNOWN
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def count(number: float) -> str:
    """Operations, in the largest unit of 1000 that leaves at least one."""
    for unit in ("", "K", "M", "G", "T"):
        if abs(number) < 1000:
            return f"{number:.0f}" if not unit else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} P"
