"""Post-import hooks: PEFT, transformers, lm-eval and hosts learn of us as they are imported.

`import torch` loads this module through the entry-point group `torch.backends` (off-label: the
group is meant for device back ends), and `import moelora_plugin` does the same. Nothing here
imports anything but the standard library, and nothing here raises: a failure is kept for `moelora
doctor`.

`MOELORA_AUTOLOAD=0` leaves other packages alone until somebody asks for us: by the first use of a
public name of `moelora_plugin`, by a host's own plugin setting, or by `moelora launch`.
"""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from collections import deque
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

ENVIRONMENT_SWITCH = "MOELORA_AUTOLOAD"

_PACKAGE = __name__.rpartition(".")[0]

# By the module after which it runs: the function, in our package, that serves it. `peft` itself is
# often half imported when torch is first imported from inside it; `mapping_func` is the last of its
# modules that the registration depends on.
HOOKS: dict[str, str] = {
    "peft.mapping_func": "registration:register",
    "peft.utils.transformers_weight_conversion": "registration:register_block_keys",
    # Where older transformers have it.
    "transformers.integrations.peft": "registration:register_native_loading",
    "transformers.training_args": "registration:register_optimizer_names",
    "transformers.trainer_optimizer": "registration:register_optimizers",
    "transformers.trainer": "registration:register_callbacks",
    "lm_eval.models": "registration:register_lm_eval_models",
    "llamafactory.hparams.parser": "integrations.llamafactory.classic:extend_arguments",
    "llamafactory.model.adapter": "integrations.llamafactory.classic_adapter:extend",
    "llamafactory.data.template": "integrations.llamafactory.text_template:register",
    "llamafactory.v1.plugins.model_plugins.peft": "integrations.llamafactory.v1:register_adapter",
    "llamafactory.v1.plugins.model_plugins.rendering": "integrations.llamafactory.v1:register_text",
    "llamafactory.v1.plugins.data_plugins.converter": (
        "integrations.llamafactory.v1:register_converter"
    ),
    "llamafactory.v1.plugins.trainer_plugins.optimizer": (
        "integrations.llamafactory.v1:register_optimizers"
    ),
    "llamafactory.v1.plugins.trainer_plugins.optimizers.optimizer": (  # 0.9.6
        "integrations.llamafactory.v1:register_optimizers"
    ),
    "llamafactory.v1.core.base_trainer": "integrations.llamafactory.v1:register_trainer",
    "axolotl.cli.merge_lora": "integrations.axolotl:register_merge",
    "axolotl.loaders.adapter": "integrations.axolotl:register_lora",
    "swift.arguments.tuner_args": "integrations.ms_swift:register_options",
    "swift.tuner_plugin.mapping": "integrations.ms_swift:register_tuner",
    "swift.pipelines.train.tuner": "integrations.ms_swift:register_comparison",
    "swift.infer_engine.transformers_engine": "integrations.ms_swift:register_engine",
    "swift.optimizers.mapping": "integrations.ms_swift:register_optimizers",
    # It makes a new list of the Trainer's default callbacks.
    "swift.trainers.patcher": "registration:register_callbacks",
}

# Targets that have been imported and are not served yet.
_waiting: deque[str] = deque()

# Why each hook failed, if it did: module name, or "activation" -> traceback. `moelora doctor`
# shows it.
failures: dict[str, str] = {}


def enabled() -> bool:
    """Whether hooks on other packages are wanted without anybody asking."""
    return os.environ.get(ENVIRONMENT_SWITCH, "1") != "0"


def installed() -> bool:
    """Whether the hooks on other packages are in place."""
    return any(isinstance(finder, _HookFinder) for finder in sys.meta_path)


def install() -> None:
    """Put the hooks in place, unless they are switched off. Safe to call any number of times."""
    if not enabled():
        return
    try:
        activate()
    except Exception:  # torch would fail to import for everyone
        _note_failure("activation")


def activate() -> None:
    """Put the hooks in place, wanted by somebody's own call. Safe to call any number of times.

    Targets that are already imported are served at once, those being imported when they are done.
    """
    if installed():
        return
    sys.meta_path.insert(0, _HookFinder())
    # What is missed: a target that another thread has found and not yet put into `sys.modules`.
    for name in HOOKS:
        module = sys.modules.get(name)
        if module is not None and not _watch(module):
            _waiting.append(name)
    _serve_waiting()


def _serve_waiting() -> None:
    # Where one of our own modules is what imports the target, serving it in the middle would import
    # that module's dependants while it has no names yet: its end comes back here.
    while _waiting and not _watch_ours():
        try:
            name = _waiting.popleft()
        except IndexError:  # another thread was faster
            return
        _serve(name)


def _serve(name: str) -> None:
    module_name, _, function = HOOKS[name].partition(":")
    try:
        getattr(importlib.import_module(f"{_PACKAGE}.{module_name}"), function)()
    # An exception here would break `import torch` or `import peft` for everyone, and an exit, which
    # some packages take when they are imported, would end the program.
    except (Exception, SystemExit):
        _note_failure(name)
    else:
        failures.pop(name, None)


def _note_failure(name: str) -> None:
    import traceback

    failures[name] = traceback.format_exc()


def _watch_ours() -> bool:
    """Whether one of our modules is half imported; the end of its import is then watched."""
    return any(
        _watch(module)
        for name, module in list(sys.modules.items())
        if name.startswith(f"{_PACKAGE}.") and name != __name__
    )


class _WatchedSpec(ModuleSpec):
    """A spec that notices the end of its module's import.

    importlib sets `_initializing` to True before a module's code runs and to False when it is done
    or has failed, in which case the module is no longer in `sys.modules`. A spec becomes a watched
    one by its `__class__`, in the middle of the import too: its loader, which others may have
    wrapped and ask for the source, stays as it is.
    """

    @property
    def _initializing(self) -> bool:
        return bool(self.__dict__.get("_initializing"))

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        self.__dict__["_initializing"] = value
        if value:
            return
        self.__class__ = ModuleSpec  # type: ignore[assignment]
        done = getattr(sys.modules.get(self.name), "__spec__", None) is self
        if done and self.name in HOOKS:
            _waiting.append(self.name)
        # After a failure too: a module of ours may have failed after it had imported a target.
        _serve_waiting()


def _watch(module: ModuleType | None) -> bool:
    """Watch the end of a module's import; False where it is not being imported."""
    spec = getattr(module, "__spec__", None)
    if type(spec) is ModuleSpec and _in_progress(spec):
        spec.__class__ = _WatchedSpec
        if not _in_progress(spec):  # another thread's import, done before it was watched
            spec.__class__ = ModuleSpec
    return type(spec) is _WatchedSpec and _in_progress(spec)


def _in_progress(spec: ModuleSpec) -> bool:
    return bool(getattr(spec, "_initializing", False))


class _HookFinder:
    """Finds nothing of its own: watches the specs of the modules that have a hook."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's real spec, watched, or None for modules without a hook.

        A reload, which brings a `target`, is left alone: importlib does not mark its end.
        """
        if fullname not in HOOKS or target is not None:
            return None
        # What `importlib.util.find_spec` would answer, but that imports parents, takes a shortcut
        # through `sys.modules`, and would come back through here.
        later = itertools.dropwhile(lambda finder: finder is not self, list(sys.meta_path))
        for finder in itertools.islice(later, 1, None):
            find_spec = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find_spec and find_spec(fullname, path, target)
            if spec is not None:
                if type(spec) is ModuleSpec:
                    spec.__class__ = _WatchedSpec
                return spec
        return None
