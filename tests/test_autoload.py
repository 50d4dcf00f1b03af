"""The post-import hooks on invented packages: nothing but the standard library, in bare processes.

`ours` is a package with the real autoload.py in it; `host` is somebody else's.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from moelora_plugin import autoload

FILES = {
    "ours/__init__.py": """
        from . import autoload
        autoload.HOOKS.clear()
        for name in ("plain", "half", "failing", "space"):
            autoload.HOOKS[f"host.{name}"] = f"registration:serve_{name}"
        autoload.install()
    """,
    "ours/registration.py": """
        from . import state
        def serve_plain():
            from host.plain import VALUE
            from .uses_plain import NAME
            state.served.append(("plain", VALUE, NAME))
        def serve_half():
            from host.half import VALUE
            state.served.append(("half", VALUE))
        def serve_failing():
            from host.failing import VALUE
            state.served.append(("failing", VALUE))
        def serve_space():
            import host.space
            state.served.append(("space",))
    """,
    "ours/state.py": "served = []",
    "ours/uses_plain.py": "import host.plain; NAME = 'complete'",
    "ours/breaks.py": "import host.plain; raise RuntimeError('ours is broken')",
    "host/__init__.py": "",
    "host/plain.py": "VALUE = 1",
    "host/half.py": "import ours; VALUE = 2",
    "host/failing.py": """
        import os
        if os.path.exists('broken'): raise RuntimeError('the host is broken')
        VALUE = 3
    """,
    "host/space/unrelated.txt": "",
}

PLAIN = ("plain", 1, "complete")

CASES = {
    "ours first": "import ours, host.plain; expect(PLAIN)",
    "ours last": "import host.plain, ours; expect(PLAIN)",
    "ours in the middle": "import host.half; expect(('half', 2))",
    "from ours, half imported": "import ours.uses_plain; expect(PLAIN)",
    "a namespace package": "import ours, host.space; expect(('space',))",
    "imported twice": "import ours, host.plain, importlib; importlib.import_module('host.plain')\n"
    "expect(PLAIN)",
    "forgotten and imported again": (
        "import ours, host.plain; del sys.modules['host.plain']; import host.plain\n"
        "expect(PLAIN, PLAIN)"
    ),
    # importlib does not mark the end of a reload. What matters: it is a reload like any other.
    "reloaded": (
        "import ours, host.plain, importlib; before = host.plain.__spec__\n"
        "importlib.reload(host.plain); assert host.plain.__spec__ is not before; expect(PLAIN)"
    ),
    "ours reloaded": (
        "import ours, importlib\nfor _ in range(3): importlib.reload(ours.autoload)\n"
        "importlib.reload(ours); import host.plain; from ours.state import served\n"
        "assert PLAIN in served"
    ),
    # The look-up that importlib.util makes of its own: no import, no hook, no watched module.
    "only looked up": (
        "import ours, importlib.util; spec = importlib.util.find_spec('host.plain')\n"
        "assert 'host.plain' not in sys.modules\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec)); expect()\n"
        "import host.plain; expect(PLAIN)"
    ),
    "a module that fails": (
        "import ours; open('broken', 'w').close()\n"
        "try: import host.failing\n"
        "except RuntimeError as error: assert str(error) == 'the host is broken'\n"
        "else: raise AssertionError\n"
        "expect(); import os; os.remove('broken'); import host.failing; expect(('failing', 3))"
    ),
    "a module of ours that fails": (
        "import ours\n"
        "try: import ours.breaks\n"
        "except RuntimeError as error: assert str(error) == 'ours is broken'\n"
        "else: raise AssertionError\n"
        "expect(PLAIN)"
    ),
    "a hook that fails, then does not": (
        "import ours, ours.registration\n"
        "serve = vars(ours.registration).pop('serve_plain')\n"
        "import host.plain; assert 'AttributeError' in ours.autoload.failures['host.plain']\n"
        "ours.registration.serve_plain = serve; del sys.modules['host.plain']; import host.plain\n"
        "expect(PLAIN)"
    ),
    "from an archive": (
        "sys.path.insert(0, 'host.zip'); import ours, host.plain\n"
        "assert '.zip' in host.plain.__file__; expect(PLAIN)"
    ),
    "switched off": (
        "import os; os.environ['MOELORA_AUTOLOAD'] = '0'; import ours, host.plain; expect()\n"
        "ours.autoload.activate(); expect(PLAIN)"
    ),
    # Finders like ours (wrapt's, ddtrace's) ask importlib.util for the spec and wrap its loader.
    **{
        f"beside another finder, {place}": f"""
import importlib.util
class Loader:
    def __init__(self, loader): self.loader = loader
    def __getattr__(self, name): return getattr(self.loader, name)
    def exec_module(self, module):
        self.loader.exec_module(module); ran.append(module.__name__)
class Other:
    busy = False
    def find_spec(self, name, path=None, target=None):
        if self.busy or not name.startswith('host.'): return None
        self.busy = True
        try: spec = importlib.util.find_spec(name)
        finally: self.busy = False
        spec.loader = Loader(spec.loader)
        return spec
ran = []
if {first}: sys.meta_path.insert(0, Other())
import ours
if not {first}: sys.meta_path.insert(0, Other())
import host.plain; assert ran == ['host.plain'], ran; expect(PLAIN)
"""
        for place, first in (("before", False), ("behind", True))
    },
    "many threads": """
import threading
sys.setswitchinterval(1e-6)
for _ in range(30):
    for name in [n for n in sys.modules if n.partition('.')[0] in ('host', 'ours')]:
        del sys.modules[name]
    sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != '_HookFinder']
    import ours.state
    names = ['host.plain', 'ours.uses_plain', 'host.half', 'host.failing', 'host.space']
    errors, barrier = [], threading.Barrier(len(names))
    def run(name):
        barrier.wait()
        try: __import__(name)
        except BaseException as error: errors.append((name, error))
    threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in names]
    for thread in threads: thread.start()
    for thread in threads: thread.join(20)
    assert not any(thread.is_alive() for thread in threads), 'deadlock'
    assert not errors, errors
    assert not ours.autoload._waiting and not ours.autoload.failures, ours.autoload.failures
    assert {s[0] for s in ours.state.served} == {'plain', 'half', 'failing', 'space'}
""",
}

PROGRAM = f"""
import sys
PLAIN = {PLAIN!r}
def expect(*served):
    import ours.autoload, ours.state
    assert ours.state.served == list(served), ours.state.served
    assert not ours.autoload._waiting, ours.autoload._waiting
    assert not ours.autoload.failures, ours.autoload.failures
    specs = [m.__spec__ for n, m in sys.modules.items() if n.startswith(('host.', 'ours.'))]
    assert {{type(spec).__name__ for spec in specs}} == {{'ModuleSpec'}}, specs
    assert not any(getattr(spec, '_initializing', False) for spec in specs)
"""


def lay_out(folder: Path) -> None:
    """Write the packages, and `host` as an archive too."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = text.strip("\n").splitlines()
        indent = min((len(s) - len(s.lstrip()) for s in lines if s.strip()), default=0)
        path.write_text("\n".join(line[indent:] for line in lines) + "\n")
    shutil.copy(autoload.__file__, folder / "ours" / "autoload.py")
    with zipfile.ZipFile(folder / "host.zip", "w") as archive:
        for path in (folder / "host").rglob("*.py"):
            archive.write(path, path.relative_to(folder))


def run(case: str, folder: Path, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-S", "-c", PROGRAM + CASES[case]],
        env={k: v for k, v in os.environ.items() if not k.startswith(("MOELORA_", "PYTHON"))},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("case", CASES)
def test_hooks(case: str, tmp_path: Path) -> None:
    lay_out(tmp_path)
    done = run(case, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("function", sorted(set(autoload.HOOKS.values())))
def test_what_a_hook_names_is_there(function: str) -> None:
    """Without importing it: it may import a host. A wrong name would only be recorded, not seen."""
    module, _, name = function.partition(":")
    path = Path(autoload.__file__).parent.joinpath(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(source.read_text("utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
