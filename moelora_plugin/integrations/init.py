"""`moelora init`: a config that a host runs as it is, and the rows that it trains on.

A folder holds both and is meant to be run in: the paths in the config are relative to it. Nothing
here imports a host, and the shipped sample needs no other library either.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from moelora_eval_tasks.catalog import TASKS, Task, resolve
from moelora_eval_tasks.loading import load_split
from moelora_eval_tasks.prompts import render

from ..errors import ConfigError, DataError
from ..files import atomic_directory, check_out_folder, write_text
from ..lookup import given, unknown_name_message
from ..presets import PRESETS
from ..reading import parse_json, read_json

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHORT_PRESETS = {"gr": "gr_moe_lora", "r": "r_moe_lora"}

_TEMPLATES = Path(__file__).parent / "templates"
_SAMPLE = Path(__file__).parents[1] / "demo" / "data" / "sst2_sample_train.jsonl"
# The paper whose gate learning rate all but freezes the routers; other methods train theirs.
_PAPER = "2502.15828"
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
_ROWS_FILE = "train.jsonl"
_ROW_CHARACTERS = 2**24  # of a row of text
_UNQUOTED = re.compile(r"[\w./~][\w .,/@+~:=()-]*")  # in YAML and in Python's strings alike
_IDENTIFIER = re.compile(r"\w[\w.-]*", re.ASCII)
_OUTPUT = "output"


@dataclass(frozen=True)
class Host:
    """What a host needs.

    Attributes:
        files: name of each file to write -> its template.
        install: the host's package.
        train: the command, run in the folder.
        adapter: where the run leaves its adapter.
        lists: whether the config writes names as a YAML list; else with commas between them.
        preferences: whether a row has a chosen and a rejected answer.
    """

    files: Mapping[str, str]
    install: str
    train: str
    adapter: str = _OUTPUT
    lists: bool = False
    preferences: bool = False


HOSTS: dict[str, Host] = {
    "llamafactory": Host(
        {
            "llamafactory.yaml": "llamafactory.yaml",
            "dataset_info.json": "llamafactory_dataset_info.json",
        },
        "llamafactory",
        "llamafactory-cli train llamafactory.yaml",
    ),
    "llamafactory-v1": Host(
        {
            "llamafactory_v1.yaml": "llamafactory_v1.yaml",
            "dataset.yaml": "llamafactory_v1_dataset.yaml",
        },
        "llamafactory",
        "USE_V1=1 llamafactory-cli sft llamafactory_v1.yaml",
    ),
    "axolotl": Host(
        {"axolotl.yaml": "axolotl.yaml"},
        "axolotl",
        "axolotl train axolotl.yaml",
        lists=True,
    ),
    "ms-swift": Host(
        {"ms_swift.yaml": "ms_swift.yaml"},
        "ms-swift",
        "swift sft ms_swift.yaml",
        adapter=f"{_OUTPUT}/last-checkpoint",
        lists=True,
    ),
    "trl": Host({"trl_sft.py": "trl_sft.py"}, "trl", "python trl_sft.py"),
    "trl-dpo": Host({"trl_dpo.py": "trl_dpo.py"}, "trl", "python trl_dpo.py", preferences=True),
    "transformers": Host(
        {"transformers_trainer.py": "transformers_trainer.py"},
        "transformers",
        "python transformers_trainer.py",
    ),
}


@dataclass(frozen=True)
class Written:
    """What `write_config` wrote.

    Attributes:
        folder: where.
        files: their names.
        rows: what the run trains on, in words.
        commands: what to run next, in order.
    """

    folder: Path
    files: tuple[str, ...]
    rows: str
    commands: tuple[str, ...]


def write_config(
    host: str,
    *,
    preset: str = "gr_moe_lora",
    model: str = DEFAULT_MODEL,
    task: str | None = None,
    data: str | None = None,
    data_dir: str | None = None,
    out: Path | None = None,
    overwrite: bool = False,
) -> Written:
    """Write a host's config and its rows into a folder.

    Args:
        host: a key of HOSTS.
        preset: a preset or one of SHORT_PRESETS; it also decides the optimizer.
        model: hub id or local folder.
        task: train on this task's training split; the shipped sample where neither this nor `data`
            is given.
        data: a JSONL file of one's own, used where it lies.
        data_dir: where to read the task's rows; None is the hub.
        out: the folder; None is `moelora-<host>`.
        overwrite: replace the files that an earlier call wrote there. What has been changed since
            is kept as NAME.old, and others in the folder stay.

    Raises:
        ConfigError: an unknown host, preset or task; two sources of rows; a folder in use.
        DataError: rows that are missing or not what the host takes.
        MissingDependencyError: the hub does not answer.
    """
    if host not in HOSTS:
        raise ConfigError(unknown_name_message("host", host, HOSTS))
    if task is not None and data is not None:
        raise ConfigError("--task and --data both say what to train on; give one of them.")
    chosen = HOSTS[host]
    preset = SHORT_PRESETS.get(preset, preset)
    modules = _target_modules(preset)
    folder = out or Path(f"moelora-{host}")
    check_out_folder(folder, overwrite=overwrite)
    values = {
        "model": Path(model).absolute().as_posix() if Path(model).is_dir() else model,
        "preset": preset,
        "optimizer": optimizer_for(preset),
        "gate_lr": gate_lr_for(preset),
        "data": _ROWS_FILE if data is None else Path(data).absolute().as_posix(),
        "output_dir": _OUTPUT,
        "target_modules": f"[{', '.join(modules)}]" if chosen.lists else ",".join(modules),
        "task": "NAMES",
        "model_type": _model_type(model),
    }
    for option, value in (("--model", values["model"]), ("--data", values["data"])):
        if not _UNQUOTED.fullmatch(value) or ": " in value:
            raise ConfigError(
                f"{option} {value!r} has characters that a config would have to quote; rename it."
            )
    texts = {}
    if data is not None:
        _check_rows(Path(data), chosen)
        rows = str(data)
    else:
        shown, docs, origin = _docs(task, data_dir)
        lines = [json.dumps(row, ensure_ascii=False) for row in _rows(shown, docs, chosen)]
        texts[_ROWS_FILE] = "\n".join(lines) + "\n"
        rows, values["task"] = f"{len(lines)} rows of {origin}", shown.name
    for file, template in chosen.files.items():
        text = (_TEMPLATES / template).read_text(encoding="utf-8")
        texts[file] = Template(text).substitute(values)
    evaluate = f"moelora eval --adapter {chosen.adapter} --compare-base --tasks {values['task']}"
    if data_dir is not None:
        evaluate += f" --data-dir {Path(data_dir).absolute()}"
    with atomic_directory(folder, overwrite=overwrite) as temporary:
        for name, text in texts.items():
            write_text(temporary / name, text)
    install = f"pip install moelora {chosen.install}"
    return Written(
        folder, tuple(sorted(texts)), rows, (install, f"cd {folder}", chosen.train, evaluate)
    )


def optimizer_for(preset: str) -> str:
    """The Riemannian AdamW that fits a preset: with the gates' rescaling unless it has none.

    Raises:
        ConfigError: there is no such preset.
    """
    overrides = given("presets", preset, PRESETS).overrides
    rescaled = overrides.get("gate_rescale") != "none" and overrides.get("num_experts") != 1
    return "gradamw" if rescaled else "radamw"


def gate_lr_for(preset: str) -> str:
    """The routers' learning rate: the paper's for its own presets, else that of the experts.

    Raises:
        ConfigError: there is no such preset.
    """
    is_paper_s = _PAPER in given("presets", preset, PRESETS).source
    return "3.0e-8" if is_paper_s else "3.0e-5"


def _target_modules(name: str) -> Sequence[str]:
    """The preset's target modules by name; the attention's where it leaves them to the user.

    Raises:
        ConfigError: an unknown preset, or one that needs what no template can know.
    """
    preset = given("presets", name, PRESETS)
    for key, what in preset.needs.items():
        raise ConfigError(
            f"Preset {name!r} needs {key} ({what}), which only you can say; write the config with "
            f"another --preset, then set preset and {key} in it."
        )
    modules = preset.overrides.get("target_modules", _ATTENTION)
    return (*_ATTENTION, *_FEED_FORWARD) if isinstance(modules, str) else modules


def _model_type(model: str) -> str:
    """ms-swift's line for the architecture, as far as it can be known without the hub."""
    config = Path(model) / "config.json"
    if model == DEFAULT_MODEL:
        return "model_type: llama"
    if config.is_file():
        content = read_json(config, remedy="name a folder of a model with --model")
        if _IDENTIFIER.fullmatch(str(content.get("model_type"))):
            return f"model_type: {content['model_type']}"
    return "# model_type: llama"


def _docs(name: str | None, data_dir: str | None) -> tuple[Task, Iterable[dict[str, Any]], str]:
    """A task, its rows, and what to call them: the shipped sample where no task is named."""
    if name is None:
        lines = _SAMPLE.read_text(encoding="utf-8").splitlines()
        return TASKS["sst2"], map(json.loads, lines), "a sample in the form of sst2"
    tasks = resolve([name])
    if len(tasks) > 1:
        names = ", ".join(task.name for task in tasks)
        raise ConfigError(f"{name!r} is a group; pass one of its tasks to --task: {names}.")
    return tasks[0], load_split(tasks[0], "train", data_dir), f"{tasks[0].name}, split train"


def _rows(task: Task, docs: Iterable[Mapping[str, Any]], host: Host) -> Iterable[dict[str, str]]:
    for index, doc in enumerate(docs):
        prompt = render(task, doc)
        right = prompt.choices[prompt.gold]
        if not host.preferences:
            yield {"prompt": prompt.context, "completion": right}
            continue
        wrong = [choice for choice in prompt.choices if choice != right]
        # In turn, so that every wrong answer is seen and the file is the same each time.
        yield {"prompt": prompt.context, "chosen": right, "rejected": wrong[index % len(wrong)]}


def _check_rows(file: Path, host: Host) -> None:
    """Refuse a file whose first row the host could not train on."""
    expected = ("prompt", "chosen", "rejected") if host.preferences else ("prompt", "completion")
    try:
        if not file.is_file():
            raise OSError("no regular file")
        with file.open(encoding="utf-8") as lines:
            row = parse_json(lines.readline(_ROW_CHARACTERS).encode())
    except (OSError, ValueError) as error:
        raise DataError(
            f"--data {file} cannot be read as JSONL; expected one object per line with "
            f"{', '.join(expected)}."
        ) from error
    if not isinstance(row, dict) or any(not isinstance(row.get(key), str) for key in expected):
        raise DataError(
            f"The first row of --data {file} has not the texts {', '.join(expected)}; "
            "rename its keys."
        )
