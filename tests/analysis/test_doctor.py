"""What the environment has and lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from moelora_plugin import autoload
from moelora_plugin.analysis import doctor
from moelora_plugin.analysis.doctor import Finding, diagnose


def found(name: str) -> Finding:
    (finding,) = (finding for finding in diagnose() if finding.name == name)
    return finding


def test_a_complete_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    findings = diagnose()
    assert len({finding.name for finding in findings}) == len(findings)
    for finding in findings:
        if finding.name != "accelerator":
            assert (finding.status, finding.remedy) == ("ok", ""), finding


@pytest.mark.parametrize(
    ("package", "status", "remedy"),
    [
        ("lm_eval", "warning", "pip install 'moelora[eval]'"),
        ("matplotlib", "warning", "pip install 'moelora[plot]'"),
        ("gguf", "warning", "pip install 'moelora[demo]'"),
        ("accelerate", "missing", "pip install accelerate"),
    ],
)
def test_a_missing_package(
    monkeypatch: pytest.MonkeyPatch, package: str, status: str, remedy: str
) -> None:
    version = doctor.version

    def without(name: str) -> str:
        if name == package:
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor, "version", without)
    finding = found(package)
    assert (finding.status, finding.remedy) == (status, remedy)
    assert "not installed" in finding.detail


def test_a_peft_outside_the_tested_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: "0.17.0" if name == "peft" else "1.0")
    assert found("peft").status == "warning"
    assert found("peft").detail == "0.17.0, not tested"


def test_a_registration_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("the enum is sealed")

    monkeypatch.setattr("moelora_plugin.registration.register", fail)
    finding = found("PEFT type MOELORA")
    assert (finding.status, finding.detail) == ("missing", "the enum is sealed")
    assert finding.remedy


def test_a_hook_that_failed_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(autoload.failures, "peft", "Traceback\n  ...\nTypeError: sealed")
    finding = found("autoload")
    assert (finding.status, finding.detail) == ("missing", "hook on peft failed: TypeError: sealed")


def test_switches_of_torch_and_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in found("autoload").detail
    assert found("hub").detail == "offline by HF_HUB_OFFLINE"


def test_autoload_switched_off() -> None:
    """In a process of its own: the switch is read when torch is imported."""
    completed = subprocess.run(
        [sys.executable, "-c", "from moelora_cli.main import main; main()", "doctor"],
        env={**os.environ, "MOELORA_AUTOLOAD": "0", "COLUMNS": "160", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stderr == ""
    (line,) = (line for line in completed.stdout.splitlines() if " autoload " in line)
    assert "warning" in line
    assert "switched off by MOELORA_AUTOLOAD=0" in line
    (line,) = (line for line in completed.stdout.splitlines() if "PEFT type MOELORA" in line)
    assert " ok " in line
