"""Post-import hooks: PEFT, transformers and the hosts learn of us as soon as they are imported.

`import torch` loads this module through the entry-point group `torch.backends` (off-label: the
group is meant for device back ends), and `import moelora_plugin` does the same. Nothing here
imports anything but the standard library, and nothing here raises: a failure is kept for `moelora
doctor`.

`MOELORA_AUTOLOAD=0` leaves other packages alone until somebody asks for us: by the first use of a
public name of `moelora_plugin`, by a host's own plugin setting, or by `moelora launch`.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

ENVIRONMENT_SWITCH = "MOELORA_AUTOLOAD"

_PACKAGE = __name__.rpartition(".")[0]

# By the module after which it runs: the function, in our package, that serves it. `peft` itself is
# often half imported when torch is first imported from inside it; `mapping_func` is the last of its
# modules that the registration depends on.
HOOKS: dict[str, str] = {
    "peft.mapping_func": "registration:register",
    "transformers.training_args": "registration:register_optimizer_names",
    "transformers.trainer_optimizer": "registration:register_optimizers",
    "transformers.trainer": "registration:register_callback",
}

# Targets that have been imported and are not served yet.
_waiting: list[str] = []

# Why each hook failed, if it did: module name -> traceback. `moelora doctor` shows it.
failures: dict[str, str] = {}


def enabled() -> bool:
    """Whether hooks on other packages are wanted without anybody asking."""
    return os.environ.get(ENVIRONMENT_SWITCH, "1") != "0"


def installed() -> bool:
    """Whether the hooks on other packages are in place."""
    return any(isinstance(finder, _HookFinder) for finder in sys.meta_path)


def install() -> None:
    """Put the hooks in place, unless they are switched off. Safe to call any number of times."""
    if enabled():
        activate()


def activate() -> None:
    """Put the hooks in place, wanted by somebody's own call. Safe to call any number of times.

    Targets that are already imported are served at once, those being imported when they are done.
    """
    if installed():
        return
    sys.meta_path.insert(0, _HookFinder())
    for name in HOOKS:
        module = sys.modules.get(name)
        if module is None:
            continue
        if _half_imported(module):
            _watch(module)
        else:
            _imported(name)


def _imported(name: str) -> None:
    """Serve what is now possible, after the import of a hook's target or of one of our modules."""
    if name in HOOKS:
        _waiting.append(name)
    while _waiting:
        if (ours := _half_imported_of_ours()) is not None:
            # One of our own modules is what imports the target. Serving it in the middle would
            # import that module's dependants while it has no names yet.
            _watch(ours)
            return
        _serve(_waiting.pop(0))


def _serve(name: str) -> None:
    module_name, _, function = HOOKS[name].partition(":")
    try:
        getattr(importlib.import_module(f"{_PACKAGE}.{module_name}"), function)()
    except Exception:  # an exception here would break `import torch` or `import peft` for everyone
        failures[name] = traceback.format_exc()


def _half_imported(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


def _half_imported_of_ours() -> ModuleType | None:
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{_PACKAGE}.") and name != __name__ and _half_imported(module):
            return module
    return None


class _WatchedSpec(importlib.machinery.ModuleSpec):
    """A spec that notices the end of its module's import.

    importlib sets `_initializing` to True before a module's code runs and to False when it is done
    or has failed, in which case the module is no longer in `sys.modules`.
    """

    @property
    def _initializing(self) -> bool:
        return bool(self.__dict__.get("_initializing"))

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        self.__dict__["_initializing"] = value
        if not value:
            self.__class__ = importlib.machinery.ModuleSpec  # type: ignore[assignment]
            module = sys.modules.get(self.name)
            if module is not None and module.__spec__ is self:
                _imported(self.name)


def _watch(module: ModuleType) -> None:
    if type(module.__spec__) is importlib.machinery.ModuleSpec:
        module.__spec__.__class__ = _WatchedSpec


class _HookFinder(importlib.abc.MetaPathFinder):
    """Finds nothing of its own: watches the specs of the modules that have a hook."""

    def __init__(self) -> None:
        self._busy: set[str] = set()

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """The module's real spec, watched, or None for modules without a hook."""
        if fullname not in HOOKS or fullname in self._busy:
            return None
        self._busy.add(fullname)  # the search below comes back through here
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._busy.discard(fullname)
        if spec is not None and type(spec) is importlib.machinery.ModuleSpec:
            spec.__class__ = _WatchedSpec
        return spec
