"""Which modules of a base an adapter goes on: never fewer than target_modules names.

PEFT matches names and adapts what it finds; what it does not find it leaves out without a word. In
transformers 5 that is most of a mixture-of-experts model, whose experts are parameters of three
dimensions and no linears. Here every name must find its module, and a base is searched for linears
that cannot take an adapter before the first is put on.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import MoeLoraConfig
from .errors import ConfigError, ReachWarning
from .fused_experts import FusedExperts, fused_experts
from .layers.linear_maps import features, is_packed_linear, maps_rows, weights_read

ALL_LINEAR = "all-linear"
# The fields of a configuration that decide which modules are adapted.
_CHOOSING = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
)


class Base:
    """What of a base can be adapted and what cannot.

    Args:
        model: the base, with adapters or without.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(_outer_modules(model))
        self.experts = fused_experts(model, self.modules)

    def linears(self) -> list[str]:
        """Last parts of the names of all linear modules: what target_modules usually holds."""
        return sorted(
            {
                name.rpartition(".")[2]
                for name, module in self.modules.items()
                if isinstance(_inner(module), nn.Linear | Conv1D)
            }
        )

    def obstacle(self, name: str) -> str | None:
        """Why a module would not learn, or would break the model; None where it can be adapted.

        Raises:
            ConfigError: the module has no features, so is nothing like a linear.
        """
        module = self.modules[name]
        base = _inner(module)
        features(base)
        if not maps_rows(base):
            return f"the forward of {type(base).__name__} does not map (..., in) to (..., out)"
        parts = name.split(".")
        for depth in range(1, len(parts)):
            parent = self.modules.get(".".join(parts[:-depth]), self.model)
            kind: type = type(parent)
            how = weights_read(kind).get(".".join(parts[-depth:]))
            if how == "never called":
                return f"{kind.__name__} takes its weight and never calls it"
            if how is not None:
                return f"{kind.__name__} computes with its weight and without its forward"
        return None

    def refusal(self) -> str:
        """What can be named, and what the base holds besides."""
        text = f"the model's linear modules are {', '.join(self.linears())}"
        if self.experts:
            text += (
                "; its experts are fused parameters, which cannot be adapted yet: "
                f"{_unique(experts.shown() for experts in self.experts)}"
            )
        return f"{text}."


def choose_targets(
    model: nn.Module,
    config: MoeLoraConfig,
    defaults: Mapping[str, Sequence[str] | str],
    model_type: str | None,
    is_saved: bool,
) -> None:
    """Settle `config.target_modules` for a base, before the first module is adapted.

    "all-linear", alone or in a list beside names, becomes the full names of what can be adapted,
    and one warning says what it leaves out. So it is where a default list, PEFT's, a preset's or a
    host's, names what is not there or cannot learn. Names that somebody gave must all be found, and
    be of modules that can learn.

    Args:
        model: the base.
        config: changed in place.
        defaults: target modules by model type, for a config without.
        model_type: the base's.
        is_saved: whether the adapter has its values from a file. It is what it is then: its names
            are not judged.

    Raises:
        ConfigError: a name finds nothing, or what cannot be adapted.
    """
    base = Base(model)
    is_default = config.targets_by_default
    if config.target_modules is None:
        if model_type is None or model_type not in defaults:
            raise ConfigError(
                f"There is no default for model type {model_type!r}; set target_modules to "
                f"some of {', '.join(base.linears())}, or to 'all-linear'."
            )
        found = defaults[model_type]
        config.target_modules = found if isinstance(found, str) else sorted(found)
        is_default = True
    targets = config.target_modules
    if not asks_for_all_linear(targets):
        _take_named(base, config, is_default, is_saved)
        return
    named = [] if isinstance(targets, str) else sorted({*targets} - {ALL_LINEAR})
    if named:
        config.target_modules = named
        _take_named(base, config, is_default, is_saved)
        named = list(config.target_modules)
    config.target_modules = ALL_LINEAR
    _expand(base, config, quiet=is_saved)
    config.target_modules = sorted({*config.target_modules, *named})


def adapts_the_same(model: nn.Module, saved: Mapping[str, Any], targets: list[str] | str) -> bool:
    """Whether other target modules would put a saved adapter on the modules that it is on.

    Args:
        model: the base, without adapters.
        saved: the adapter's configuration, whose other keys that choose modules hold for both.
        targets: names or an expression, read as a default: what the base has not, or what cannot
            learn, is left out.

    Raises:
        ConfigError: the base has nothing of them.
    """
    chosen: dict[str, Any] = {key: saved.get(key) for key in _CHOOSING}
    config = MoeLoraConfig(**chosen)
    other = copy.copy(config)
    other.target_modules = targets
    other.targets_by_default = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReachWarning)
        choose_targets(model, other, {}, None, is_saved=False)
    return all(
        bool(check_target_module_exists(config, key))
        == bool(check_target_module_exists(other, key))
        for key in Base(model).modules
    )


def asks_for_all_linear(targets: Iterable[str] | str | None) -> bool:
    """Whether target modules are "all-linear", or a list with it among its names."""
    if isinstance(targets, str):
        return targets.lower() == ALL_LINEAR
    return ALL_LINEAR in (targets or ())


def _take_named(base: Base, config: MoeLoraConfig, is_default: bool, is_saved: bool) -> None:
    """Judge names or an expression, and leave out what no name stands for alone."""
    targets = config.target_modules
    chosen = [key for key in base.modules if check_target_module_exists(config, key)]
    if not chosen:
        raise ConfigError(_nothing_chosen(base, config))
    if is_saved:
        return
    notes = _shortfall(base, config, chosen)
    if notes and not is_default:
        raise ConfigError(f"target_modules={_shown(targets)} {notes[0]}")
    for note in notes:
        text = f"The default target_modules={_shown(targets)} {note}"
        warnings.warn(text, ReachWarning, stacklevel=2)
    _check_layers(base, config, targets)
    _leave_out_the_dead(base, config, chosen, is_default)


def _leave_out_the_dead(
    base: Base, config: MoeLoraConfig, chosen: list[str], is_default: bool
) -> None:
    """Refuse a name that finds nothing but modules which cannot learn; else pass over those.

    By default names, of which nobody has asked for each, all together must find one that can.
    """
    obstacles = {key: why for key in chosen if (why := base.obstacle(key)) is not None}
    targets = config.target_modules
    names = [None] if isinstance(targets, str) or is_default else sorted(targets or ())
    for name in names:
        found = [key for key in chosen if name is None or _ends(name)(key)]
        if found and all(key in obstacles for key in found):
            raise ConfigError(
                f"target_modules={_shown(targets)} cannot have {name or found[0]}: "
                f"{obstacles[found[0]]}, so that an adapter on {found[0]} would not take part; "
                "name other modules."
            )
    if obstacles:
        config.target_modules = [key for key in chosen if key not in obstacles]
        warnings.warn(
            f"target_modules={_shown(targets)} leaves out, of {type(base.model).__name__}: "
            f"{_by_obstacle(obstacles)}.",
            ReachWarning,
            stacklevel=2,
        )


def _by_obstacle(obstacles: Mapping[str, str]) -> str:
    """Modules that are left out, by why; each as its last two names."""
    names: dict[str, list[str]] = {}
    for key, why in obstacles.items():
        names.setdefault(why, []).append(".".join(key.split(".")[-2:]))
    return "; ".join(f"{_unique(found)} ({why})" for why, found in names.items())


def _expand(base: Base, config: MoeLoraConfig, quiet: bool) -> None:
    """Put the full names of all linears that can be adapted in the place of "all-linear"."""
    _maybe_include_all_linear_layers(config, base.model)
    packed = (key for key, module in base.modules.items() if is_packed_linear(_inner(module)))
    linears = {*(config.target_modules or ()), *packed}
    # By last names: PEFT does not ask in which layer a module is that is named in full.
    by_name = copy.copy(config)
    by_name.target_modules = sorted({_last(key) for key in linears})
    wanted = [key for key in sorted(linears) if check_target_module_exists(by_name, key)]
    if config.layers_to_transform is not None:
        wanted = [key for key in wanted if "." in key]  # PEFT takes the others for full names
    obstacles = {key: why for key in wanted if (why := base.obstacle(key)) is not None}
    if len(obstacles) == len(wanted):
        config.target_modules = ALL_LINEAR
        raise ConfigError(_nothing_chosen(base, config))
    if not quiet:
        _check_layers(base, by_name, ALL_LINEAR)
    config.target_modules = [key for key in wanted if key not in obstacles]
    parts = [_by_obstacle(obstacles)] if obstacles else []
    experts = [e for e in base.experts if not _is_excluded(config, e)]
    if experts:
        parts.append(
            "the experts, which are fused parameters and cannot be adapted yet: "
            f"{_unique(e.shown() for e in experts)}"
        )
    if parts and not quiet:
        warnings.warn(
            f"target_modules='all-linear' leaves out, of {type(base.model).__name__}: "
            f"{'; '.join(parts)}.",
            ReachWarning,
            stacklevel=2,
        )


def _shortfall(base: Base, config: MoeLoraConfig, chosen: list[str]) -> list[str]:
    """How less would be adapted than target_modules names; each a sentence's end."""
    notes = []
    targets = config.target_modules
    assert targets is not None
    fused = [
        experts
        for experts in base.experts
        if not _is_excluded(config, experts)
        and any(check_target_module_exists(config, key) for key in experts.full_names())
    ]
    if isinstance(targets, str):
        if fused:
            notes.append(
                "matches fused parameters of experts as well, which cannot be adapted yet: "
                f"{_unique(e.shown() for e in fused)}; leave them out of the expression, or set "
                f"exclude_modules to {_unique(_last(e.module) for e in fused)!r}."
            )
        return notes
    names = sorted(targets)
    keys = [key for experts in fused for key in experts.full_names()]
    partly = [
        name for name in names if any(map(_ends(name), keys)) and any(map(_ends(name), chosen))
    ]
    lost = [name for name in names if not any(map(_ends(name), base.modules))]
    if lost:
        verb = "matches" if len(lost) == 1 else "match"
        notes.append(f"names {', '.join(lost)}, which {verb} no module; {base.refusal()}")
    if partly:
        apart = _unique(
            ".".join(key.split(".")[-2:])
            for key in chosen
            if any(_ends(name)(key) for name in partly)
        )
        notes.append(
            f"names both linears and fused parameters of experts, which cannot be adapted yet, by "
            f"{', '.join(partly)}; name the linears alone by more of their names: {apart}."
        )
    return notes


def _nothing_chosen(base: Base, config: MoeLoraConfig) -> str:
    """Why nothing is adapted: nothing has such a name, or other keys leave all of it out."""
    shown = f"target_modules={_shown(config.target_modules)}"
    bare = copy.copy(config)
    keys = ("exclude_modules", "modules_to_save", "layers_to_transform")
    bare.exclude_modules = bare.modules_to_save = bare.layers_to_transform = None
    named = config.target_modules == ALL_LINEAR or any(
        check_target_module_exists(bare, key) for key in base.modules
    )
    if not named:
        return f"{shown} matches no module; {base.refusal()}"
    given = [f"{key}={value!r}" for key in keys if (value := getattr(config, key)) is not None]
    if not given:
        return f"{shown} finds no linear module that can be adapted; {base.refusal()}"
    return f"{shown} matches modules that {' and '.join(given)} leave out, and no others."


def _check_layers(base: Base, config: MoeLoraConfig, shown: Iterable[str] | str | None) -> None:
    """Each index of layers_to_transform has something to adapt."""
    indexes = config.layers_to_transform
    if indexes is None:
        return
    one = copy.copy(config)
    for index in [indexes] if isinstance(indexes, int) else indexes:
        one.layers_to_transform = [index]
        if not any(check_target_module_exists(one, key) for key in base.modules):
            raise ConfigError(
                f"layers_to_transform={indexes!r} names layer {index}, in which "
                f"target_modules={_shown(shown)} matches nothing; layers are counted from 0."
            )


def _outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The base's own modules, an adapted one as a whole."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or (inside and name.startswith(inside)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")
        yield name, module


def _inner(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _is_excluded(config: MoeLoraConfig, experts: FusedExperts) -> bool:
    """Whether exclude_modules or modules_to_save names the experts' module."""
    everything = copy.copy(config)
    everything.target_modules = ".*"
    everything.layers_to_transform = None
    return not check_target_module_exists(everything, experts.module)


def _ends(name: str) -> Any:
    return lambda key: key == name or key.endswith(f".{name}")


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _unique(texts: Iterable[str]) -> str:
    return ", ".join(sorted(set(texts)))


def _shown(targets: Any) -> str:
    """As somebody wrote them; a page of full names is cut."""
    if isinstance(targets, str):
        return repr(targets)
    listed = sorted(targets)
    return repr(listed) if len(listed) <= 12 else f"{listed[:12]!r} and {len(listed) - 12} more"
