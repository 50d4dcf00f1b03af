"""The parts of a configuration, checked before there is a base.

Names are looked up and options compared with what each part takes. Then every part is built once,
on the meta device, where nothing has values and no random number is drawn: what a part would refuse
in front of a base it refuses here. Widths are nominal. So is the plan (how many experts of which
rank), where the allocation or the site settles it for each module: a part is refused when it takes
no plan at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .errors import ConfigError, first_line
from .families import FAMILIES, Family, find, how_to_add
from .lookup import check_options, given, nearest
from .types import LayerPlan
from .values import MAX_ELEMENTS, shown

if TYPE_CHECKING:
    from .config import MoeLoraConfig

T = TypeVar("T")

_WIDTH = 64  # of what a router reads
_ROUTER = ("router_input", "router_score", "router")
_DIVISIBLE = 5040  # experts, by whatever an option divides them
# What a part may raise on a value that it cannot use.
_MISUSE = (
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
)


def check_parts(config: MoeLoraConfig) -> None:
    """Look up, compare and build every part that a configuration names.

    Raises:
        ConfigError: a name is unknown, an option is unknown or has a value that cannot be.
    """
    parts = {kind.key: _part(config, kind) for kind in FAMILIES.values() if kind.options}
    plans = _plans(config, parts["allocation"])
    _check_site(config, parts["site"])
    router_input = _build(config, "router_input", parts, [()])
    wide = [(_WIDTH, plan) for plan in plans]
    score = _build(config, "router_score", parts, wide)
    _require_size("router_score_kwargs", score)
    router = _build(config, "router", parts, wide)
    _require_size("router_kwargs", router)
    _check_modifiers(config, router, plans)
    experts = _check_experts(config, parts, plans)
    routing = _check_fit(config, (router_input, score, router), experts)
    _check_init(config, _build(config, "init", parts, [()]), experts)
    _check_scale(config, plans)
    _check_losses(config, plans, routing, experts)


def import_parts(config: MoeLoraConfig) -> None:
    """Import what a person's configuration names by dotted path, where that is not done yet."""
    for kind in FAMILIES.values():
        if kind.key is not None:
            named = getattr(config, kind.key)
            for name in [named] if isinstance(named, str) else named:
                if "." in name:
                    given(kind.name, name, kind.built_in())


def _part(config: MoeLoraConfig, kind: Family, name: str | None = None) -> Any:
    """The part that a configuration names, whose options are among those it has."""
    assert kind.key is not None
    named = getattr(config, kind.key) if name is None else name
    part = _found(config, kind, named)
    if kind.options is not None:
        check_options(kind.options, part, getattr(config, kind.options))
    return part


def _found(config: MoeLoraConfig, kind: Family, name: str) -> Any:
    table = kind.built_in()
    if not config.is_saved:
        return given(kind.name, name, table)
    part = find(kind.name, name)
    if part is None:
        close = nearest(name, table, limit=1)
        hint = f" (is {close[0]!r} meant?)" if close else ""
        raise ConfigError(
            f"The saved configuration names the {kind.what} {name!r}, which is neither built in "
            f"nor registered here{hint}, and nothing is imported because a file says so; "
            f"{how_to_add(kind.name, name)}."
        )
    return part


def _plans(config: MoeLoraConfig, allocation: Any) -> list[LayerPlan]:
    """What a module may get: the plan where it is known, else several."""
    home = FAMILIES["allocations"].home()
    known: list[LayerPlan] = home.CHECKS[allocation](config) if allocation in home.CHECKS else []
    is_uniform = allocation is home.uniform
    if is_uniform and config.site in ("linear", "model"):
        return known
    experts, top_k, alpha = config.num_experts, config.top_k, config.lora_alpha
    rank = 1 if config.total_rank else config.r
    numbers = ((experts, top_k), (experts, 1), (1, 1), (_DIVISIBLE, _DIVISIBLE))
    return [
        *known,
        *(
            LayerPlan(count, kept, (each,) * count, alpha)
            for count, kept in numbers
            for each in ((rank,) if is_uniform else (rank, 1))
        ),
    ]


def _build(
    config: MoeLoraConfig,
    key: str,
    parts: Mapping[str | None, Callable[..., Any]],
    arguments: Sequence[tuple[Any, ...]],
) -> Any:
    """The part of a key, built with the first arguments that it takes."""
    kind = next(kind for kind in FAMILIES.values() if kind.key == key)
    assert kind.options is not None
    options = getattr(config, kind.options)
    where = f"{kind.options}={shown(dict(options))}"
    return _first_that_works(
        where, lambda *given: parts[key](*given, **options), arguments, getattr(config, key)
    )


def _first_that_works(
    where: str, call: Callable[..., T], arguments: Sequence[tuple[Any, ...]], name: str
) -> T | None:
    """What a call gives; None where it needs values, which there are none of here."""
    first: ConfigError | None = None
    for given_ in arguments:
        try:
            with torch.device("meta"), torch.no_grad():
                return call(*given_)
        except ConfigError as error:
            first = first or error
        except _MISUSE as error:
            if isinstance(error, RuntimeError) and "meta" in str(error):
                return None
            first = first or ConfigError(
                f"{where} cannot be used by {name!r}: {first_line(error)}."
            )
    assert first is not None
    raise first


def _check_site(config: MoeLoraConfig, site: Any) -> None:
    where = f"site_kwargs={shown(dict(config.site_kwargs))}"
    _first_that_works(where, lambda: site.check(config, **config.site_kwargs), [()], config.site)


def _check_modifiers(config: MoeLoraConfig, router: Any, plans: Sequence[LayerPlan]) -> None:
    kind = FAMILIES["router_modifiers"]
    for name, value in config.router_modifiers.items():
        modifier = _part(config, kind, name)
        where = f"router_modifiers[{name!r}]={shown(value)}"
        call = _with_value(modifier, value)
        _first_that_works(where, call, [(plan,) for plan in plans], name)
    has_bias = "balance_bias" in config.router_modifiers
    if has_bias and router is not None and not router.by_preference:
        raise ConfigError(
            f"router_modifiers['balance_bias'] acts on routers that select the best experts, "
            f"which router={config.router!r} does not; take it out, or set router to 'topk'."
        )


def _with_value(modifier: Any, value: Any) -> Callable[[LayerPlan], Any]:
    return lambda plan: modifier(value, plan)


def _check_experts(
    config: MoeLoraConfig, parts: Mapping[str | None, Any], plans: Sequence[LayerPlan]
) -> Any:
    """The experts; None where they need values."""
    if config.universal_expert != "none":
        plans = [plan.with_universal() for plan in plans]
    # A width that every number of experts divides.
    arguments = [(plan, 8 * plan.num_experts, 8 * plan.num_experts) for plan in plans]
    experts = _build(config, "expert", parts, arguments)
    if experts is not None:
        shapes = experts.shapes()
        for name in set(shapes) - {"A", "B"}:
            _require_numbers("expert_kwargs", sum(_sizes([shapes[name]])))
    return experts


def _check_fit(config: MoeLoraConfig, parts: tuple[Any, Any, Any], experts: Any) -> Any:
    """Have a router's parts take a decision: which, or None where that cannot be told here."""
    router_input, score, router = parts
    home = FAMILIES["routers"].home()
    built_in = {kind.key: kind.built_in() for kind in FAMILIES.values()}
    # Those of others may read what is not made up here.
    are_ours = all(
        type(part) is built_in[key].get(getattr(config, key))
        for key, part in zip(_ROUTER, parts, strict=True)
    )
    beside = experts if config.site == "linear" else None
    if not are_ours or score.plan != router.plan or (beside is None and config.site == "linear"):
        return None

    def decide() -> Any:
        width = _WIDTH if beside is None else beside.in_features
        tensors = {} if beside is None else _tensors(beside)
        return home.try_routing(
            router_input,
            type(score)(width, score.plan, **config.router_score_kwargs),
            type(router)(width, router.plan, **config.router_kwargs),
            None if beside is None else beside.split(tensors),
            tensors.get("A"),
        )

    try:
        with torch.device("meta"), torch.no_grad():
            return decide()
    except ConfigError:
        raise
    except _MISUSE:  # not everything computes on the meta device
        return None


def _check_init(config: MoeLoraConfig, initialization: Any, experts: Any) -> None:
    """Show an initialisation the experts that it is to fill, without values."""
    init, expert = FAMILIES["initializations"], FAMILIES["experts"]
    built_in = (init.built_in().get(config.init), expert.built_in().get(config.expert))
    if (type(initialization), type(experts)) != built_in:  # others may read what is not made up
        return
    plan, rows, columns = experts.plan, experts.out_features, experts.in_features
    with torch.device("meta"):
        tensors = _tensors(experts)
        filled = {name: tensor for name, tensor in tensors.items() if name not in experts.frozen}
        if rank := initialization.offset_rank(plan):
            offset = {"offset_A": torch.empty(rank, columns), "offset_B": torch.empty(rows, rank)}
            filled.update(offset)
        weight = torch.empty(rows, columns)
        pairs = experts.split(tensors)
    initialization.check_experts(
        init.home().InitInput(filled, pairs, lambda: weight, (rows, columns), plan, 1.0, "")
    )


def _tensors(experts: Any) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape) for name, shape in experts.shapes().items()}


def _check_scale(config: MoeLoraConfig, plans: Sequence[LayerPlan]) -> None:
    scale = _part(config, FAMILIES["scales"])
    arguments = [(config, plan, _WIDTH) for plan in plans]
    _first_that_works(f"scale={config.scale!r}", scale, arguments, config.scale)


def _check_losses(
    config: MoeLoraConfig, plans: Sequence[LayerPlan], routing: Any, experts: Any
) -> None:
    kind = FAMILIES["losses"]
    for name, value in config.aux_losses.items():
        loss = _part(config, kind, name)
        options = dict(value) if isinstance(value, Mapping) else {}
        options.pop("coefficient", None)
        where = f"aux_losses[{name!r}]"
        check_options(where, loss, options)
        if loss is kind.built_in().get(name):  # others may read what is not made up here
            given_ = _loss_input(kind.home(), config, routing, experts)
            call = kind.home().on_nothing(loss, options, given_)
            numbers = [(plan.num_experts,) for plan in plans]
            _first_that_works(f"{where}={shown(value)}", call, numbers, name)


def _loss_input(home: Any, config: MoeLoraConfig, routing: Any, experts: Any) -> Any:
    """What a layer gives its losses; None where that cannot be told here."""
    if routing is None or experts is None:
        return None
    if config.site != "linear":  # the experts are elsewhere
        return home.LossInput(routing)
    with torch.device("meta"):
        tensors = _tensors(experts)
        x_TI = torch.empty(4, experts.in_features)
    return home.LossInput(
        routing,
        experts=lambda: experts.split(tensors),
        outputs=lambda at_M: experts.outputs(tensors, x_TI[at_M], 1.0),
    )


def _require_size(key: str, module: torch.nn.Module | None) -> None:
    if module is not None:
        tensors = [*module.parameters(), *module.buffers()]
        _require_numbers(key, sum(tensor.numel() for tensor in tensors))


def _sizes(shapes: Sequence[tuple[int, ...]]) -> Iterator[int]:
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        yield size


def _require_numbers(key: str, numbers: int) -> None:
    if numbers > MAX_ELEMENTS:
        raise ConfigError(
            f"{key} asks for {numbers:,} numbers in one narrow layer, more than {MAX_ELEMENTS:,}; "
            "lower its widths."
        )
