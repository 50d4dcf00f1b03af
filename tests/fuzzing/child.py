"""One mutant in a process of its own, watched: what it opened, what it ran, how it ended."""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moelora_plugin.errors import MoeLoraError

from .artefacts import Artefacts
from .targets import Refused, Target

_MEMORY = 3 << 30  # above what the process has; the artefacts take a few megabytes
_CPU_SECONDS = 20
_RUNS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "os.fork", "pty.spawn")
_USUAL = ("uname",)  # the standard library's platform asks for the processor
# What may be read beside the artefact: code, the machine's own tables, and what the run made.
_SYSTEM = ("/usr/", "/lib", "/proc/", "/sys/", "/dev/null", "/dev/urandom", "/dev/tty", "/dev/fd")


def run(target: Target, folder: Path, artefacts: Artefacts, out: Path) -> None:
    """Read the artefact and write to `out` how that went; never returns."""
    record: dict[str, Any] = {"outcome": "crash", "watched": []}
    try:
        _limit()
        os.chdir(artefacts.canary)  # a file of the working directory must not be imported
        sys.path.insert(0, "")
        tempfile.tempdir = str(folder.parent)
        os.environ["MOELORA_CACHE"] = str(folder.parent / "cache")
        _silence(folder.parent)
        allowed = (folder.parent, artefacts.base, artefacts.folder)
        base = _named_base(folder) if target.opens_base else None
        sys.addaudithook(
            _hook(record["watched"], [str(p) for p in allowed], artefacts.canary, base)
        )
        record |= _read(target, folder, artefacts)
    except BaseException as error:
        record |= {"outcome": "traceback", "message": repr(error)[:500]}
    out.write_text(json.dumps(record))
    os._exit(0)


def _read(target: Target, folder: Path, artefacts: Artefacts) -> dict[str, Any]:
    logged = _Logged(level=logging.WARNING)
    for name in ("transformers", "moelora_plugin", "peft"):
        logging.getLogger(name).addHandler(logged)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            answer = target.run(folder, artefacts)
        except (MoeLoraError, Refused) as error:
            return {"outcome": "refused", "message": str(error)}
        except Exception as error:
            ours = target.is_ours or _is_ours(error)
            text = "".join(traceback.format_exception(error))[-1500:]
            return {"outcome": "traceback" if ours else "refused by the library", "message": text}
    said = sorted({str(w.message)[:200] for w in caught if not _is_usual(w)} | logged.said)
    return {
        "outcome": "answered",
        "answer": _digest(answer),
        "warned": said,
        "shown": answer if isinstance(answer, str) else "",
    }


class _Logged(logging.Handler):
    """What libraries say to their log, as transformers does of tensors that are missing."""

    said: set[str]

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.said = set()

    def emit(self, record: logging.LogRecord) -> None:
        self.said.add(record.getMessage()[:200])


def _is_ours(error: BaseException) -> bool:
    """Whether the error was raised in our code, or in what our code called.

    A library's loader that cannot read a file raises before it asks us.
    """
    frames = traceback.extract_tb(error.__traceback__)
    # Our look at what transformers has loaded comes after it: until then the call is transformers'.
    ours = (f for f in frames if f.name != "load_checked_adapter")
    return any("moelora_plugin" in frame.filename for frame in ours)


def _is_usual(warning: Any) -> bool:
    return issubclass(warning.category, FutureWarning | DeprecationWarning)


def _digest(answer: Any) -> Any:
    """JSON that tells whether two answers are the same."""
    if isinstance(answer, Tensor):
        return [bool(torch.isfinite(answer.double()).all()), answer.double().flatten().tolist()]
    return answer


def _limit() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))


def _silence(folder: Path) -> None:
    out = os.open(folder / "printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)


def _named_base(folder: Path) -> str | None:
    """The file that the artefact names as its base, if it does."""
    try:
        name = json.loads((folder / "adapter_config.json").read_bytes())["base_model_name_or_path"]
        return os.path.realpath(name) if os.path.isfile(name) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _hook(watched: list[list[str]], allowed: Iterable[str], canary: Path, base: str | None) -> Any:
    """An audit hook: notes commands, connections, and files outside of the allowed folders."""
    roots = tuple(
        [f"{root}" for root in allowed]
        + [sys.prefix, sys.base_prefix, *_SYSTEM]
        + [str(Path(module).parents[1]) for module in _sources()]
    )

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in _RUNS and args[0] not in _USUAL:
            watched.append(["ran", f"{event} {args[:2]!r:.200}"])
        elif event == "socket.connect":
            watched.append(["opened", f"connection {args[1]!r:.100}"])
        elif event in ("open", "os.listdir", "os.remove", "os.rename", "os.mkdir", "shutil.rmtree"):
            path = args[0]
            in_folder = event in ("os.remove", "os.mkdir") and args[-1] != -1
            if isinstance(path, int) or path is None or in_folder:  # rmtree's names are relative
                return
            name = os.path.realpath(os.fsdecode(path))
            if name == base:
                return
            if name.startswith(str(canary) + os.sep) or not name.startswith(roots):
                watched.append(["opened", f"{event} {name:.200}"])

    return hook


def _sources() -> list[str]:
    """Files of our packages, wherever they are installed."""
    names = ("moelora_plugin", "moelora_cli", "moelora_eval_tasks", "torch", "peft")
    return [str(sys.modules[name].__file__) for name in names]
