"""PEFT and transformers know us in whatever order modules are imported; importing us is light.

Every case runs in a process of its own. A fresh interpreter needs five seconds for `import peft`,
nearly all of them for torch and transformers; so most cases are forked from one that has imported
those two and nothing of PEFT or of ours, and a few start from nothing. How the hooks work is tested
in test_autoload.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

import moelora_plugin

ROOT = Path(moelora_plugin.__file__).parents[1]
# One per part of the package; where two are alike in what they import, one stands for both.
SUBMODULES = [
    "autoload",
    "types",
    "config",
    "registration",
    "model",
    "layers.linear",
    "routers.topk",
    "ops.rank_gated",
    "optim.riemannian",
    "checkpoint",
    "analysis",
    "export",
]

# What each process reports after its imports, as one line of JSON.
REPORT = """
import json as _json, sys as _sys
_autoload = _sys.modules.get("moelora_plugin.autoload")
_peft = _sys.modules.get("peft")
_trainer = {}
if _module := _sys.modules.get("transformers.training_args"):
    _trainer["names"] = "GRADAMW" in _module.OptimizerNames.__members__
if _module := _sys.modules.get("transformers.trainer_optimizer"):
    _trainer["handlers"] = "gradamw" in _module._OPTIMIZER_HANDLERS
if _module := _sys.modules.get("transformers.trainer"):
    _names = [callback.__name__ for callback in _module.DEFAULT_CALLBACKS]
    _trainer["callback"] = _names.count("AuxLossCallback") == 1
print(_json.dumps({
    "heavy": [m for m in ("torch", "peft", "transformers") if m in _sys.modules],
    "known": _peft is not None
        and "MOELORA" in _peft.PeftType.__members__
        and "MOELORA" in _peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING
        and "MOELORA" in _peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
    "trainer": _trainer,
    "failures": None if _autoload is None else _autoload.failures,
}), flush=True)
"""

# Forks a child for each case; TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps an installed moelora out of the
# parent.
WARM = """
import json, os, sys, traceback
import torch, accelerate
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
assert not [m for m in sys.modules if m.partition(".")[0] in ("peft", "moelora_plugin")]
cases, report = json.load(sys.stdin)
for name, code in cases.items():
    print(name, flush=True)
    if (child := os.fork()) == 0:
        try:
            exec(compile(code + report, name, "exec"), {"__name__": name})
        except BaseException:
            print(json.dumps(traceback.format_exc()), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""

ORDERS = {
    "ours, peft": "import moelora_plugin, peft",
    "peft, ours": "import peft, moelora_plugin",
    "a module of peft, ours": "import peft.tuners.lora; import moelora_plugin",
    "ours, a module of peft": "import moelora_plugin; from peft.mapping_func import get_peft_model",
    "ours twice": "import moelora_plugin, importlib\nimportlib.reload(moelora_plugin)\nimport peft",
    "a public name only": "from moelora_plugin import MoeLoraConfig",
    "an optimizer only": "from moelora_plugin import RiemannianSGD",
    "every public name": "from moelora_plugin import *",
    "switched off, a public name": (
        "import os; os.environ['MOELORA_AUTOLOAD'] = '0'\n"
        "import peft, moelora_plugin\nassert 'MOELORA' not in peft.PeftType.__members__\n"
        "moelora_plugin.MoeLoraConfig(r=1)"
    ),
    "ours, Trainer": "import moelora_plugin; from transformers import Trainer; import peft",
    "Trainer, ours": "from transformers import Trainer; import moelora_plugin, peft",
    # Imports transformers.training_args while it is half imported itself.
    "our callback, Trainer": (
        "import moelora_plugin.trainer_callbacks; from transformers import Trainer; import peft"
    ),
    "switched off, a public name after Trainer": (
        "import os; os.environ['MOELORA_AUTOLOAD'] = '0'\n"
        "from transformers import Trainer; from moelora_plugin import MoeLoraConfig; import peft"
    ),
    **{f"{module}, peft": f"import moelora_plugin.{module}, peft" for module in SUBMODULES},
}
OTHER_CASES = {
    "switched off": (
        "import os; os.environ['MOELORA_AUTOLOAD'] = '0'\n"
        "import moelora_plugin, peft, transformers.trainer"
    ),
    "a hook that raises": (
        "from moelora_plugin import autoload, registration\n"
        "def broken(): raise RuntimeError('broken on purpose')\n"
        "registration.register = broken\n"
        "import peft\nassert peft.LoraConfig(r=1).r == 1"
    ),
}


def environment(**overrides: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k != "MOELORA_AUTOLOAD"}
    return {
        **clean,
        "PYTHONPATH": str(ROOT),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
        **overrides,
    }


def fresh(code: str, tmp_path: Path, **overrides: str) -> dict:
    """Run `code` in an interpreter that starts from nothing, outside the checkout."""
    done = subprocess.run(
        [sys.executable, "-c", code + REPORT],
        env=environment(**overrides),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, dict]:
    done = subprocess.run(
        [sys.executable, "-c", WARM],
        input=json.dumps([{**ORDERS, **OTHER_CASES}, REPORT]),
        env=environment(TORCH_DEVICE_BACKEND_AUTOLOAD="0"),
        cwd=tmp_path_factory.mktemp("warm"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return {name: json.loads(report) for name, report in zip(lines[::2], lines[1::2], strict=True)}


def entry_point(folder: Path, target: str) -> None:
    """What pip leaves of a package that declares our entry point."""
    info = folder / "moelora-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moelora\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[torch.backends]\nmoelora = {target}\n")


EVERYTHING = {"names": True, "handlers": True, "callback": True}


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_imports_ends_with_all_of_them_knowing_us(reports, order):
    report = reports[order]
    assert isinstance(report, dict), report
    assert report["known"]
    assert report["failures"] == {}
    assert set(report["trainer"].values()) <= {True}
    assert "Trainer" not in order or report["trainer"] == EVERYTHING


def test_switched_off_others_are_left_alone(reports):
    report = reports["switched off"]
    assert not report["known"]
    assert report["trainer"] == dict.fromkeys(EVERYTHING, False)
    assert report["failures"] == {}


def test_a_hook_that_raises_is_recorded_and_breaks_nothing(reports):
    report = reports["a hook that raises"]
    assert not report["known"]
    assert list(report["failures"]) == ["peft.mapping_func"]
    assert "RuntimeError: broken on purpose" in report["failures"]["peft.mapping_func"]


@pytest.mark.parametrize("submodule", ["autoload", "errors", "files", "lookup", "presets", "types"])
def test_importing_the_package_imports_nothing_heavy(submodule, tmp_path):
    report = fresh(f"import moelora_plugin, moelora_plugin.{submodule}", tmp_path)
    assert report == {"heavy": [], "known": False, "trainer": {}, "failures": {}}


ACTIVE = "import sys; assert 'moelora_plugin.autoload' in sys.modules"


@pytest.mark.parametrize(
    "first",
    [
        f"import torch; {ACTIVE}; assert 'peft' not in sys.modules",
        f"import peft; {ACTIVE}",
        # torch is first imported from inside transformers.training_args.
        "from transformers import TrainingArguments\n"
        "assert TrainingArguments(output_dir='out', optim='gradamw').optim.value == 'gradamw'",
        "import transformers.trainer",
    ],
    ids=["torch", "peft", "TrainingArguments", "Trainer"],
)
def test_the_entry_point_serves_a_program_that_never_names_us(first, tmp_path):
    """Most of these import torch on their way: they are half imported when we come."""
    entry_point(tmp_path, "moelora_plugin.autoload:install")
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    report = fresh(f"{first}\nimport peft, transformers.trainer", tmp_path, PYTHONPATH=path)
    assert report["known"]
    assert report["trainer"] == EVERYTHING
    assert report["failures"] == {}


def test_the_entry_point_switched_off_does_nothing(tmp_path):
    entry_point(tmp_path, "moelora_plugin.autoload:install")
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    report = fresh(
        f"import torch; {ACTIVE}\n"
        "assert not sys.modules['moelora_plugin.autoload'].installed()\n"
        "import transformers.training_args",
        tmp_path,
        PYTHONPATH=path,
        MOELORA_AUTOLOAD="0",
    )
    assert report["trainer"] == {"names": False}
    assert report["failures"] == {}


def test_torch_survives_a_broken_hook(tmp_path):
    """A package like ours, whose hook on something already imported cannot even be found."""
    package = tmp_path / "broken"
    package.mkdir()
    shutil.copy(ROOT / "moelora_plugin" / "autoload.py", package)
    (package / "__init__.py").write_text(
        "from . import autoload\nautoload.HOOKS['json'] = 'nowhere:register'\n"
    )
    entry_point(tmp_path, "broken.autoload:install")
    fresh(
        "import json, torch, broken; assert torch.zeros(1).item() == 0.0\n"
        "assert list(broken.autoload.failures) == ['json'], broken.autoload.failures\n"
        "assert 'ModuleNotFoundError' in broken.autoload.failures['json']",
        tmp_path,
        PYTHONPATH=str(tmp_path),
    )


def test_nothing_is_left_on_a_hooked_module():
    """Whoever looks at it finds it loaded as if there were no hook."""
    import peft.mapping_func

    assert type(peft.mapping_func.__spec__) is ModuleSpec
    assert peft.mapping_func.__loader__ is peft.mapping_func.__spec__.loader
    assert "def get_peft_model" in peft.mapping_func.__loader__.get_source("peft.mapping_func")
