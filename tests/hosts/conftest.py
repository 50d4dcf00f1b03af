"""Stock host programs in environments of their own, with moelora beside them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from environments import environment, install_moelora
from tiny import tiny_llama, tiny_tokenizer

HERE = Path(__file__).parent

# Raw turns: what is trained as prompt and completion is what a chat asks.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("hosts")


@dataclass(frozen=True)
class Host:
    """An environment with a host's stock programs."""

    name: str
    bin: Path
    moelora: Path  # a folder that holds moelora as pip installs it
    scratch: Path

    def run(
        self,
        *command: str,
        moelora: bool = True,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        check: bool = True,
        ends: tuple[int, ...] = (0,),
        stdin: str = "",
        timeout: float = 600,
    ) -> subprocess.CompletedProcess[str]:
        """Run one of the environment's commands, with or without moelora installed.

        With `check` its exit code must be one of `ends`. A command that takes longer than `timeout`
        seconds is ended and counts as done, since gloo now and then waits for ever in a finished
        process (torch 2.13): what it should have written is for the test to look for.
        """
        process = subprocess.Popen(
            [str(self.bin / command[0]), *command[1:]],
            env={**self._environment(moelora), **(env or {})},
            cwd=cwd or self.scratch,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            stdout, stderr = process.communicate(stdin, timeout)
            code = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # torchrun then ends its workers, in 30 seconds
            stdout, stderr = process.communicate(timeout=90)
            code = 0
        done = subprocess.CompletedProcess(command, code, stdout, stderr)
        if check:
            assert done.returncode in ends, (
                f"{' '.join(command)} ended with {done.returncode}\n"
                f"--- stdout\n{done.stdout[-4000:]}\n--- stderr\n{done.stderr[-8000:]}"
            )
        return done

    def _environment(self, moelora: bool) -> dict[str, str]:
        ours = {key for key in os.environ if key.startswith(("MOELORA_", "PYTEST_", "COV_"))}
        kept = {k: v for k, v in os.environ.items() if k not in {*ours, "PYTHONPATH"}}
        return {
            **kept,
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "VIRTUAL_ENV": str(self.bin.parent),
            **({"PYTHONPATH": str(self.moelora)} if moelora else {}),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.scratch / "huggingface"),
            "MODELSCOPE_CACHE": str(self.scratch / "modelscope"),
            "OMP_NUM_THREADS": "1",  # with more, tiny models are many times slower
            "TOKENIZERS_PARALLELISM": "false",
            "WANDB_DISABLED": "true",
            "AXOLOTL_DO_NOT_TRACK": "1",
            "DO_NOT_TRACK": "1",
        }


@pytest.fixture(scope="session")
def installed_moelora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with moelora as pip installs it, entry point and all."""
    return install_moelora(tmp_path_factory.mktemp("moelora"))


def _host(name: str, moelora: Path, tmp_path_factory: pytest.TempPathFactory) -> Host:
    return Host(name, environment(name) / "bin", moelora, tmp_path_factory.mktemp(name))


@pytest.fixture(scope="session")
def llamafactory(installed_moelora, tmp_path_factory) -> Host:
    return _host("llamafactory", installed_moelora, tmp_path_factory)


@pytest.fixture(scope="session")
def axolotl(installed_moelora, tmp_path_factory) -> Host:
    return _host("axolotl", installed_moelora, tmp_path_factory)


@pytest.fixture(scope="session")
def ms_swift(installed_moelora, tmp_path_factory) -> Host:
    """Also the environment of TRL 0.29 with transformers 5.19 and PEFT 0.20."""
    return _host("ms_swift", installed_moelora, tmp_path_factory)


@pytest.fixture(scope="session")
def trl(installed_moelora, tmp_path_factory) -> Host:
    return _host("trl", installed_moelora, tmp_path_factory)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """A tiny random Llama, its tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    model = tiny_llama()
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    return folder


def _write_rows(file: Path, rows: list[dict[str, str]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


WORDS = [
    "positive",
    "negative",
    "wrong",
    "correct",
    "neutral",
    "yes",
    "no",
    "film",
    "author",
    "text",
    "meaning",
    "option",
]


@pytest.fixture(scope="session")
def sft_file(tmp_path_factory) -> Path:
    """Sixteen rows {"prompt", "completion"} of different lengths."""
    rows = [
        {
            "prompt": f"Sentence: the {' '.join(WORDS[i % 5 : i % 5 + 1 + i % 4])} is number {i}."
            " The correct answer is",
            "completion": f" {WORDS[i % len(WORDS)]}",
        }
        for i in range(16)
    ]
    return _write_rows(tmp_path_factory.mktemp("sft") / "rows.jsonl", rows)


@pytest.fixture(scope="session")
def dpo_file(tmp_path_factory) -> Path:
    """Sixteen rows {"prompt", "chosen", "rejected"}."""
    rows = [
        {
            "prompt": f"Question: is {WORDS[i % 7]} the meaning of number {i}? The answer is",
            "chosen": f" {WORDS[i % len(WORDS)]}",
            "rejected": f" {WORDS[(i + 3) % len(WORDS)]} {WORDS[i % 3]}",
        }
        for i in range(16)
    ]
    return _write_rows(tmp_path_factory.mktemp("dpo") / "rows.jsonl", rows)
