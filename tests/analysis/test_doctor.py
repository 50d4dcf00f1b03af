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
from moelora_plugin.launch import SITE


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


def test_an_lm_eval_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: "0.4.11" if name == "lm_eval" else "1.0")
    assert found("lm_eval").status == "warning"
    assert found("lm_eval").detail == "0.4.11, not tested (moelora eval)"
    assert found("lm_eval").remedy == "pip install 'moelora[eval]'"


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


def test_optimizer_names_that_cannot_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("no table of optimizers")

    monkeypatch.setattr("moelora_plugin.registration.register_optimizers", fail)
    finding = found("optimizers")
    assert (finding.status, finding.detail) == ("missing", "no table of optimizers")
    assert finding.remedy == "pip install 'transformers>=5.6,<=5.24'"
    assert found("Trainer").status == "missing"
    assert "no table of optimizers" in found("Trainer").detail


HOSTS = {"LLaMA-Factory": "llamafactory", "axolotl": "axolotl", "ms-swift": "ms-swift"}


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions of packages, beside those that are really there."""
    installed = doctor.version
    invented = {"llamafactory": "0.9.5", "axolotl": "0.19.0", "ms-swift": "4.6.0", "trl": "1.16.2"}
    monkeypatch.setattr(doctor, "version", lambda name: invented.get(name) or installed(name))
    return invented


def test_a_host_that_is_not_installed_is_not_named() -> None:
    assert {finding.name for finding in diagnose()}.isdisjoint(HOSTS)


@pytest.mark.usefixtures("versions")
@pytest.mark.parametrize("name", [*HOSTS, "TRL", "Trainer"])
def test_a_host_of_a_tested_version(name: str) -> None:
    finding = found(name)
    assert (finding.status, finding.remedy) == ("ok", "")
    assert finding.detail.endswith("will work")


@pytest.mark.parametrize(
    ("name", "package", "other", "tested"),
    [
        ("LLaMA-Factory", "llamafactory", "0.9.6.dev0", "llamafactory==0.9.5"),
        ("axolotl", "axolotl", "0.18.0", "axolotl==0.19.0"),
        ("ms-swift", "ms-swift", "5.0", "ms-swift==4.6.0"),
        ("TRL", "trl", "0.28.9", "trl>=0.29,<=1.16"),
        ("TRL", "trl", "1.17.0", "trl>=0.29,<=1.16"),
        ("Trainer", "transformers", "5.5.0", "transformers>=5.6,<=5.24"),
    ],
)
def test_a_host_of_another_version(
    versions: dict[str, str], name: str, package: str, other: str, tested: str
) -> None:
    versions[package] = other
    finding = found(name)
    assert (finding.status, finding.remedy) == ("warning", f"tested with {tested}")
    assert finding.detail.startswith(f"{other}, not tested")


@pytest.mark.usefixtures("versions")
def test_hosts_where_torch_loads_no_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags of axolotl, TRL and transformers import us themselves."""
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    findings = {finding.name: finding for finding in diagnose()}
    assert [findings[name].status for name in ("axolotl", "TRL", "Trainer")] == ["ok"] * 3
    assert findings["LLaMA-Factory"].status == findings["ms-swift"].status == "warning"
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in findings["LLaMA-Factory"].detail
    assert "moelora launch llamafactory-cli" in findings["LLaMA-Factory"].remedy
    assert "moelora path ms-swift" in findings["ms-swift"].remedy
    monkeypatch.setenv("PYTHONPATH", SITE)
    assert found("autoload").detail == "activated by `moelora launch`"
    assert found("LLaMA-Factory").status == "ok"


@pytest.mark.usefixtures("versions")
def test_a_hook_that_failed_in_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(autoload.failures, "swift.arguments", "Traceback\nTypeError: moved")
    assert found("ms-swift").status == "missing"
    assert "TypeError: moved" in found("ms-swift").detail
    assert found("axolotl").status == "ok"


def test_autoload_switched_off() -> None:
    """In a process of its own: the switch is read when torch is imported."""
    completed = subprocess.run(
        [sys.executable, "-c", "from moelora_cli.main import main; main()", "doctor"],
        env={**os.environ, "MOELORA_AUTOLOAD": "0", "COLUMNS": "160"},
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
