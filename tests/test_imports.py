"""PEFT knows MOELORA in whatever order modules are imported, and importing the package is light.

Every case runs in a process of its own. A fresh interpreter needs five seconds for `import peft`,
nearly all of them for torch and transformers; so most cases are forked from one that has imported
those two and nothing of PEFT or of ours, and a few start from nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
print(_json.dumps({
    "heavy": [m for m in ("torch", "peft", "transformers") if m in _sys.modules],
    "known": _peft is not None
        and "MOELORA" in _peft.PeftType.__members__
        and "MOELORA" in _peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING
        and "MOELORA" in _peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
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
    **{f"{module}, peft": f"import moelora_plugin.{module}, peft" for module in SUBMODULES},
}
OTHER_CASES = {
    "switched off": (
        "import os; os.environ['MOELORA_AUTOLOAD'] = '0'\nimport moelora_plugin, peft"
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


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_imports_ends_with_peft_knowing_us(reports, order):
    report = reports[order]
    assert isinstance(report, dict), report
    assert report["known"]
    assert report["failures"] == {}


def test_switched_off_peft_is_left_alone(reports):
    report = reports["switched off"]
    assert not report["known"]
    assert report["failures"] == {}


def test_a_hook_that_raises_is_recorded_and_breaks_nothing(reports):
    report = reports["a hook that raises"]
    assert not report["known"]
    assert list(report["failures"]) == ["peft.mapping_func"]
    assert "RuntimeError: broken on purpose" in report["failures"]["peft.mapping_func"]


@pytest.mark.parametrize("submodule", ["autoload", "errors", "files", "lookup", "presets", "types"])
def test_importing_the_package_imports_nothing_heavy(submodule, tmp_path):
    report = fresh(f"import moelora_plugin, moelora_plugin.{submodule}", tmp_path)
    assert report == {"heavy": [], "known": False, "failures": {}}


@pytest.mark.parametrize("first", ["torch", "peft"])
def test_the_entry_point_serves_a_program_that_never_names_us(first, tmp_path):
    """`import peft` imports torch on its way: the entry point runs while PEFT is half imported."""
    folder = tmp_path / "moelora-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: moelora\nVersion: 0\n")
    (folder / "entry_points.txt").write_text(
        "[torch.backends]\nmoelora = moelora_plugin.autoload:install\n"
    )
    report = fresh(
        f"import {first}\nimport sys\nassert 'moelora_plugin.autoload' in sys.modules\n"
        f"assert ('peft' in sys.modules) == ({first!r} == 'peft')\nimport peft",
        tmp_path,
        PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)]),
    )
    assert report["known"]
    assert report["failures"] == {}


def test_the_loader_is_put_back():
    """Whoever looks at a hooked module finds it loaded as if there were no hook."""
    import peft.mapping_func

    assert type(peft.mapping_func.__spec__.loader).__module__ != "moelora_plugin.autoload"
    assert peft.mapping_func.__loader__ is peft.mapping_func.__spec__.loader
    assert "def get_peft_model" in peft.mapping_func.__loader__.get_source("peft.mapping_func")
