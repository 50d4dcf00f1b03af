"""Activates moelora in a Python that `moelora launch` has started, or that such a one has.

Then it makes way for the environment's own `sitecustomize`. It never raises: a host must start.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

_HERE = Path(__file__).parent
_HOME = _HERE.parents[2]
# Where our packages lie: installed under their names, or a checkout.
_FOLDERS = {
    "moelora_plugin": ("moelora_plugin",),
    "moelora_eval_tasks": ("moelora_eval_tasks", "eval_tasks"),
}


class _Fallback:
    """Finds moelora where this file lies, in an environment that does not have it."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        for folder in _FOLDERS.get(name, ()):
            file = _HOME / folder / "__init__.py"
            if file.exists():
                return spec_from_file_location(name, file)
        return None


def _activate() -> None:
    sys.meta_path.append(_Fallback)  # the last to be asked
    try:
        from moelora_plugin import autoload

        autoload.activate()
    except Exception as error:
        print(f"moelora launch: not activated, {type(error).__name__}: {error}", file=sys.stderr)


def _run_the_next_sitecustomize() -> None:
    # Only here: in the environment the folder stays, for the workers.
    sys.path[:] = [folder for folder in sys.path if folder != str(_HERE)]
    spec = PathFinder.find_spec("sitecustomize")
    if spec is not None and spec.loader is not None:
        module = sys.modules["sitecustomize"] = module_from_spec(spec)
        spec.loader.exec_module(module)


_activate()
_run_the_next_sitecustomize()
