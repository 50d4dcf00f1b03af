"""Post-import hooks: PEFT learns the type MOELORA as soon as it is imported, whoever imports it.

`import torch` loads this module through the entry-point group `torch.backends` (off-label: the
group is meant for device back ends), and `import moelora_plugin` does the same. Nothing here
imports anything but the standard library, and nothing here raises: a failure is kept for `moelora
doctor`.

`MOELORA_AUTOLOAD=0` switches the hooks on other packages off. Then the type is registered when a
public name of `moelora_plugin` is first used.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType

ENVIRONMENT_SWITCH = "MOELORA_AUTOLOAD"

# Why each hook failed, if it did: module name -> traceback. `moelora doctor` shows it.
failures: dict[str, str] = {}


# `peft` itself is often half imported when torch is first imported from inside it; `mapping_func`
# is the last of its modules that the registration depends on.
PEFT_READY = "peft.mapping_func"
_OWN_PREFIX = __name__.rpartition(".")[0] + "."


def _register(finished: str) -> None:
    """Register our PEFT type once PEFT is there and none of our own modules is half imported.

    The second condition matters where one of our modules is what imports PEFT: registering in the
    middle would import that module's dependants while it has no names yet. Its own hook tries
    again.
    """
    if PEFT_READY not in sys.modules:
        return
    for name, module in list(sys.modules.items()):
        if name.startswith(_OWN_PREFIX) and name != finished and _half_imported(module):
            return
    from .registration import register

    register()


def _half_imported(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


# Hooks on other packages, by the module after which they run. Our own modules always carry
# `_register`.
_HOST_HOOKS: dict[str, Callable[[str], None]] = {PEFT_READY: _register}


def enabled() -> bool:
    """Whether hooks on other packages are wanted."""
    return os.environ.get(ENVIRONMENT_SWITCH, "1") != "0"


def installed() -> bool:
    """Whether the finder is in place."""
    return any(isinstance(finder, _HookFinder) for finder in sys.meta_path)


def install() -> None:
    """Put the hooks in place, once. Targets that are already imported are served at once."""
    if installed():
        return
    hooks = _HOST_HOOKS if enabled() else {}
    sys.meta_path.insert(0, _HookFinder(hooks))
    for name, hook in hooks.items():
        module = sys.modules.get(name)
        if module is not None and not _half_imported(module):
            _run(hook, name)


def _run(hook: Callable[[str], None], name: str) -> None:
    try:
        hook(name)
    except Exception:  # an exception here would break `import torch` or `import peft` for everyone
        failures[name] = traceback.format_exc()


class _HookFinder(importlib.abc.MetaPathFinder):
    """Finds nothing of its own: wraps a hooked module's loader so that its hook runs afterwards."""

    def __init__(self, hooks: dict[str, Callable[[str], None]]) -> None:
        self._hooks = hooks
        self._busy: set[str] = set()

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """The module's real spec with a wrapped loader, or None for modules without a hook."""
        hook = self._hooks.get(fullname)
        if hook is None and fullname.startswith(_OWN_PREFIX):
            hook = _register
        if hook is None or fullname in self._busy:
            return None
        self._busy.add(fullname)  # the search below comes back through here
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._busy.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _HookLoader(spec.loader, fullname, hook)
        return spec


class _HookLoader(importlib.abc.Loader):
    """Loads as the real loader does, then runs the hook."""

    def __init__(
        self, loader: importlib.abc.Loader, name: str, hook: Callable[[str], None]
    ) -> None:
        self._loader = loader
        self._name = name
        self._hook = hook

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """As the real loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the real loader does, then the hook."""
        self._loader.exec_module(module)
        # The rest of the process sees the module with its own loader, as if we had not been here.
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        _run(self._hook, self._name)
