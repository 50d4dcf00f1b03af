"""`moelora init` writes a config that is complete, and rows that hold evaluation's prompts."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from task_rows import ROWS, write_data
from typer.testing import CliRunner

from moelora_cli.main import app
from moelora_eval_tasks.catalog import TASKS
from moelora_eval_tasks.prompts import render
from moelora_plugin import files
from moelora_plugin.integrations.init import HOSTS, optimizer_for
from moelora_plugin.presets import PRESETS


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOELORA_DATA_DIR", raising=False)


def init(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["init", *map(str, arguments)])


def written(*arguments: object) -> str:
    result = init(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


def refused(*arguments: object) -> str:
    result = init(*arguments)
    assert (result.exit_code, result.stdout) == (1, ""), result.output + repr(result.exception)
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def rows(folder: str) -> list[dict[str, Any]]:
    lines = Path(folder, "train.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("host", HOSTS)
def test_a_folder_to_run_in(host: str) -> None:
    output = written(host, "--preset", "gr", "--model", "some/model", "--out", "made")
    folder = Path("made")
    names = {path.name for path in folder.iterdir()}
    assert names == {*HOSTS[host].files, "train.jsonl", ".moelora.json"}
    everything = ""
    for name in HOSTS[host].files:
        text = (folder / name).read_text("utf-8")
        everything += text
        assert "$" not in text
        if name.endswith(".py"):
            ast.parse(text)
        elif not name.endswith(".sh"):
            assert yaml.safe_load(text)  # JSON is YAML
    for value in ("some/model", "gr_moe_lora", "gradamw", "train.jsonl", "q_proj", "output"):
        assert value in everything
    # The command names a file that was written, and the evaluation reads what the run writes.
    commands = [line.strip() for line in output.partition("Next:")[2].splitlines()]
    assert "cd made" in commands
    assert commands[-2].split()[-1] in names
    adapter = "output/last-checkpoint" if host == "ms-swift" else "output"
    assert commands[-1] == f"moelora eval --adapter {adapter} --compare-base --tasks sst2"


@pytest.mark.parametrize(
    ("host", "key"), [("axolotl", "lora_target_modules"), ("ms-swift", "target_modules")]
)
def test_hosts_that_take_the_target_modules_as_a_list(host: str, key: str) -> None:
    written(host)
    (file,) = HOSTS[host].files
    config = yaml.safe_load(Path(f"moelora-{host}", file).read_text("utf-8"))
    assert config[key] == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_the_shipped_sample_is_what_an_evaluation_of_sst2_shows() -> None:
    written("trl")
    made = rows("moelora-trl")
    assert len(made) == 480
    assert {row["completion"] for row in made} == {" negative", " positive"}
    first = {"sentence": "its honesty is refreshing and its humor is a gift.", "label": 1}
    assert made[2] == {"prompt": render(TASKS["sst2"], first).context, "completion": " positive"}


@pytest.mark.parametrize("task", ["sst2", "commonsenseqa", "stsb"])
def test_the_rows_of_a_task(task: str) -> None:
    write_data(Path("rows"), [task])
    output = written("trl", "--task", task, "--data-dir", "rows")
    prompts = [render(TASKS[task], row) for row in ROWS[task]]
    assert rows("moelora-trl") == [
        {"prompt": prompt.context, "completion": prompt.choices[prompt.gold]} for prompt in prompts
    ]
    assert f"--tasks {task} --data-dir {Path.cwd() / 'rows'}" in output


def test_preferences_are_wrong_answers_in_turn() -> None:
    write_data(Path("rows"), ["commonsenseqa"])
    for out in ("one", "two"):
        written("trl-dpo", "--task", "commonsenseqa", "--data-dir", "rows", "--out", out)
    made = rows("one")
    for row, doc in zip(made, ROWS["commonsenseqa"], strict=True):
        prompt = render(TASKS["commonsenseqa"], doc)
        assert row["prompt"] == prompt.context
        assert row["chosen"] == prompt.choices[prompt.gold]
        assert row["rejected"] in set(prompt.choices) - {row["chosen"]}
    assert [row["rejected"] for row in made] == [" A", " C", " D"]  # right are B, A, C
    assert made == rows("two")


@pytest.mark.parametrize("host", ["llamafactory", "trl-dpo"])
def test_rows_of_one_s_own_are_used_where_they_lie(host: str) -> None:
    row = {"prompt": "p", "completion": " c", "chosen": " c", "rejected": " d"}
    Path("mine.jsonl").write_text(json.dumps(row) + "\n")
    output = written(host, "--data", "mine.jsonl", "--out", "made")
    assert not Path("made", "train.jsonl").exists()
    texts = [path.read_text("utf-8") for path in Path("made").iterdir()]
    assert any(str(Path.cwd() / "mine.jsonl") in text for text in texts)
    assert "--tasks NAMES" in output


@pytest.mark.parametrize(("config", "expected"), [(None, None), ({"model_type": "qwen3"}, "qwen3")])
def test_ms_swift_is_told_the_architecture_where_it_is_known(
    config: dict[str, str] | None, expected: str | None
) -> None:
    if config is not None:
        Path("base").mkdir()
        Path("base/config.json").write_text(json.dumps(config))
    written("ms-swift", "--model", "base", "--out", "run")
    assert yaml.safe_load(Path("run/ms_swift.yaml").read_text()).get("model_type") == expected


def test_a_local_model_is_found_from_within_the_folder() -> None:
    Path("base").mkdir()
    written("trl", "--model", "base")
    assert f'"{Path.cwd() / "base"}"' in Path("moelora-trl", "trl_sft.py").read_text("utf-8")


@pytest.mark.parametrize(
    ("preset", "name", "optimizer"),
    [
        ("gr", "gr_moe_lora", "gradamw"),
        ("r", "r_moe_lora", "radamw"),
        ("moe_lora", "moe_lora", "gradamw"),
        ("gr_exact", "gr_exact", "gradamw"),
        ("single_lora", "single_lora", "radamw"),
    ],
)
def test_the_preset_decides_the_optimizer(preset: str, name: str, optimizer: str) -> None:
    written("llamafactory", "--preset", preset)
    config = yaml.safe_load(Path("moelora-llamafactory", "llamafactory.yaml").read_text("utf-8"))
    assert (config["moelora_preset"], config["optim"]) == (name, optimizer)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_an_optimizer(preset: str) -> None:
    assert optimizer_for(preset) in {"radamw", "gradamw"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lamafactory"], "did you mean 'llamafactory'"),
        (["trl", "--preset", "gr_mo"], "did you mean 'gr_moe_lora'"),
        (["trl", "--task", "sst3"], "did you mean 'sst2'"),
        (["trl", "--task", "glue"], "'glue' is a group; pass one of its tasks to --task: cola"),
        (["trl", "--task", "sst2", "--data", "rows.jsonl"], "give one of them"),
        (["trl", "--task", "sst2", "--data-dir", "nowhere"], "nowhere does not exist"),
        (["trl", "--data", "nowhere.jsonl"], "cannot be read as JSONL"),
        (["trl", "--data", "text.txt"], "cannot be read as JSONL"),
        (["trl", "--data", "rows.jsonl"], "has not the texts prompt, completion"),
        (["trl-dpo", "--data", "rows.jsonl"], "has not the texts prompt, chosen, rejected"),
    ],
)
def test_bad_input_leaves_nothing_behind(arguments: list[str], message: str) -> None:
    Path("text.txt").write_text("no JSON\n")
    Path("rows.jsonl").write_text('{"instruction": "?", "output": "!"}\n')
    before = sorted(Path.cwd().iterdir())
    assert message in refused(*arguments)
    assert sorted(Path.cwd().iterdir()) == before


def test_a_failure_while_writing_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail_second(path: Path, text: str) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError("disk full")
        files.write_text(path, text)

    monkeypatch.setattr("moelora_plugin.integrations.init.write_text", fail_second)
    assert isinstance(init("llamafactory").exception, OSError)
    assert list(Path.cwd().iterdir()) == []


def test_a_folder_in_use_is_refused_and_overwriting_keeps_what_is_not_ours() -> None:
    written("trl", "--out", "made")
    config, adapter = Path("made", "trl_sft.py"), Path("made", "output", "adapter.safetensors")
    adapter.parent.mkdir()
    adapter.write_text("trained")
    config.write_text("edited")
    assert "made already holds something" in refused("trl", "--out", "made")
    assert config.read_text() == "edited"
    written("trl", "--out", "made", "--overwrite")
    assert "MoeLoraConfig" in config.read_text()
    assert Path("made", "trl_sft.py.old").read_text() == "edited"
    assert adapter.read_text() == "trained"


def test_the_shipped_sample_needs_no_heavy_library() -> None:
    program = (
        "import sys\nfrom moelora_cli.main import main\ntry: main()\n"
        "finally: assert not {'torch', 'datasets', 'peft', 'transformers'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", program, "init", "trl"]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert completed.returncode == 0, completed.stderr


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("preset", "rate"), [("moe_lora", 3e-8), ("mola", 3e-5)])
def test_the_routers_rate_is_the_paper_s_for_its_own_presets_only(
    host: str, preset: str, rate: float
) -> None:
    written(host, "--preset", preset, "--out", "made")
    text = "".join(Path("made", name).read_text("utf-8") for name in HOSTS[host].files)
    (found,) = re.findall(r"gate_lr(?:=|: )([\d.e-]+)", text)
    assert float(found) == rate
