"""The families of methods, and the parts that a user's own code adds to them.

A part is a class or function that a configuration names: a router, a score, a loss, ... Those built
in stand in one table per family, which is imported when it is asked for. A program adds its own:

    moelora_plugin.register_router("mine", MyRouter)

and a package by an entry point in the group `moelora.<family>` ("moelora.routers"). What is added
must keep the family's contract, which is checked before it is called. Standard library only.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Literal

from .errors import ConfigError

_PACKAGE = __name__.rpartition(".")[0]


@dataclass(frozen=True)
class Family:
    """Parts of one kind.

    Attributes:
        name: in the plural, as in the entry-point group.
        what: one of them, for messages.
        module: where the table of the built-in ones is.
        table: the table's name there.
        contract: what a part must be. A class of that module: for "class" its subclasses, for
            "value" its instances. For "function": what it is called with, separated by commas.
        kind: whether parts are classes, functions or values.
        key: the configuration's key that names one of them; None where no configuration does.
        options: the key with its options; None where there are none, or they stand beside the name.
    """

    name: str
    what: str
    module: str
    table: str
    contract: str
    kind: Literal["class", "function", "value"] = "class"
    key: str | None = None
    options: str | None = None

    def built_in(self) -> Mapping[str, Any]:
        """The table of the built-in parts."""
        found: Mapping[str, Any] = getattr(self.home(), self.table)
        return found

    def refusal(self, part: object) -> str | None:
        """Why something is no part of this family, as the end of a sentence; None where it is."""
        if self.kind == "function":
            return self._no_function(part)
        contract = getattr(self.home(), self.contract)
        full_name = f"{contract.__module__}.{contract.__name__}"
        if self.kind == "value":
            return None if isinstance(part, contract) else f"is no {full_name}"
        if not (isinstance(part, type) and issubclass(part, contract)):
            return f"is no subclass of {full_name}"
        if inspect.isabstract(part):
            missing = ", ".join(sorted(getattr(part, "__abstractmethods__", ())))
            return f"is a subclass of {full_name} that lacks {missing}"
        return None

    def _no_function(self, part: object) -> str | None:
        what = f"is no function of ({self.contract})"
        if isinstance(part, type) or inspect.isbuiltin(part) or not callable(part):
            return what
        try:
            inspect.signature(part).bind_partial(*self.contract.split(", "))
            parameters = inspect.signature(part).parameters.values()
        except (TypeError, ValueError):
            return what
        needed = [
            parameter
            for parameter in parameters
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
            and parameter.default is parameter.empty
        ]
        return what if len(needed) > len(self.contract.split(", ")) else None

    def home(self) -> Any:
        """The module of the built-in parts, which a caller below it cannot import by name."""
        return importlib.import_module(self.module, _PACKAGE)


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "sites", "site", ".layers.sites", "SITES", "Site", key="site", options="site_kwargs"
        ),
        Family(
            "router_inputs",
            "router_input",
            ".routers.inputs",
            "INPUTS",
            "RouterInput",
            key="router_input",
            options="router_input_kwargs",
        ),
        Family(
            "router_scores",
            "router_score",
            ".routers.scores",
            "SCORES",
            "Score",
            key="router_score",
            options="router_score_kwargs",
        ),
        Family(
            "routers",
            "router",
            ".routers",
            "ROUTERS",
            "Router",
            key="router",
            options="router_kwargs",
        ),
        Family(
            "router_modifiers",
            "router_modifier",
            ".routers.modifiers",
            "MODIFIERS",
            "Modifier",
            key="router_modifiers",
        ),
        Family(
            "experts",
            "expert",
            ".experts",
            "EXPERTS",
            "ExpertKind",
            key="expert",
            options="expert_kwargs",
        ),
        Family(
            "allocations",
            "allocation",
            ".allocation",
            "ALLOCATIONS",
            "config, place",
            kind="function",
            key="allocation",
            options="allocation_kwargs",
        ),
        Family(
            "initializations",
            "initialization",
            ".initialization",
            "INITIALIZATIONS",
            "Initialization",
            key="init",
            options="init_kwargs",
        ),
        Family(
            "scales",
            "scale",
            ".scaling",
            "SCALES",
            "config, plan, in_features",
            kind="function",
            key="scale",
        ),
        Family("losses", "loss", ".losses", "LOSSES", "inputs", kind="function", key="aux_losses"),
        Family("features", "feature", ".clusters", "FEATURES", "Features"),
        Family("presets", "preset", ".presets", "PRESETS", "Preset", kind="value"),
    )
}

# What this program has added, by family and name.
_registered: dict[str, dict[str, Any]] = {name: {} for name in FAMILIES}


def register(family: str, name: str, part: Any) -> None:
    """Let configurations name a part of one's own, saved ones included.

    Registering anew replaces what this program has registered under the name.

    Args:
        family: a key of `FAMILIES` ("routers").
        name: what a configuration says, like "mine"; also a dotted path.
        part: the class or function.

    Raises:
        ConfigError: the name is taken by a built-in part, or the part is not of the family.
    """
    if family not in FAMILIES:
        raise ConfigError(f"There is no family {family!r}; there are {', '.join(FAMILIES)}.")
    kind = FAMILIES[family]
    if not (isinstance(name, str) and name):
        raise ConfigError(f"The name {name!r} of a {kind.what} must be text.")
    if name in kind.built_in():
        raise ConfigError(f"The {kind.what} {name!r} is built in; register yours by another name.")
    _registered[family][name] = _of_family(kind, name, part)


def find(family: str, name: str) -> Any | None:
    """The part that is built in or was added under a name; None where there is none.

    Raises:
        ConfigError: an entry point has the name that cannot be imported or is not of the family.
    """
    kind = FAMILIES[family]
    for table in (kind.built_in(), _registered[family]):
        if name in table:
            return table[name]
    for entry_point in entry_points(group=f"moelora.{family}"):
        if entry_point.name == name:
            try:
                part = entry_point.load()
            except Exception as error:
                raise ConfigError(
                    f"The entry point {name!r} in the group 'moelora.{family}' cannot be imported "
                    f"({error}); mend or uninstall its package."
                ) from error
            _registered[family][name] = _of_family(kind, name, part)
            return part
    return None


def name_of(family: str, part: object) -> str:
    """The name under which a part is built in or was added.

    Raises:
        ConfigError: it is neither.
    """
    for table in (FAMILIES[family].built_in(), _registered[family]):
        for name, known in table.items():
            if known is part:
                return name
    raise ConfigError(
        f"{part!r} has no name that could be saved; call moelora_plugin.{registrar(family)} first."
    )


def import_part(family: str, path: str) -> Any:
    """Import and register the part that a person names by its dotted path.

    Never for a name that comes out of a saved file: an import runs code.

    Raises:
        ConfigError: nothing can be imported from there, or it is not of the family.
    """
    kind = FAMILIES[family]
    part = _of_family(kind, path, import_object(kind.what, path))
    _registered[family][path] = part
    return part


def import_object(what: str, path: str) -> Any:
    """What a person names by its dotted path.

    Args:
        what: what it should be, for the message.
        path: the path.

    Raises:
        ConfigError: it cannot be imported.
    """
    module, _, attribute = path.rpartition(".")
    try:
        if not all(part.isidentifier() for part in path.split(".")):
            raise ImportError("it is no dotted path")
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the module's own code raises
        raise ConfigError(f"Cannot import {what} {path!r}: {error}.") from error


def trust(text: str) -> None:
    """Import a part that a saved adapter needs, because a person says so (`--trust`).

    Args:
        text: its dotted path, which is also the name that it then has; or NAME=PATH.

    Raises:
        ConfigError: nothing can be imported from there, or it is a part of no family.
    """
    name, _, path = text.rpartition("=")
    part = import_object("part", path)
    families = [kind.name for kind in FAMILIES.values() if kind.refusal(part) is None]
    if not families:
        raise ConfigError(
            f"--trust {path} is a part of no family ({', '.join(FAMILIES)}); name a class or "
            "function that keeps the contract of one of them."
        )
    for family in families:
        register(family, name or path, part)


def how_to_add(family: str, name: str) -> str:
    """What somebody can do about a name that is not known, as a part of a sentence."""
    path = name if "." in name else f"{name}=PATH"
    return (
        f"if it is yours or you trust who wrote it, call "
        f"moelora_plugin.{registrar(family)}({name!r}, ...) in the program that loads, install a "
        f"package with that entry point in the group 'moelora.{family}', or pass --trust {path} "
        "to a command of moelora"
    )


def registrar(family: str) -> str:
    """The name of the public function that registers a part of a family."""
    return f"register_{FAMILIES[family].what if family != 'features' else family}"


def _of_family(kind: Family, name: str, part: Any) -> Any:
    refusal = kind.refusal(part)
    if refusal is not None:
        raise ConfigError(f"The {kind.what} {name!r} {refusal}; it is not used.")
    return part


def _for(family: str) -> Callable[[str, Any], None]:
    def registering(name: str, part: Any) -> None:
        register(family, name, part)

    registering.__name__ = registering.__qualname__ = registrar(family)
    registering.__doc__ = f"Register a part of `{family}` under a name; see `register`."
    return registering


register_site = _for("sites")
register_router_input = _for("router_inputs")
register_router_score = _for("router_scores")
register_router = _for("routers")
register_router_modifier = _for("router_modifiers")
register_expert = _for("experts")
register_allocation = _for("allocations")
register_initialization = _for("initializations")
register_scale = _for("scales")
register_loss = _for("losses")
register_features = _for("features")
register_preset = _for("presets")
