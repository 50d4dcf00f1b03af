"""Names out of files reach terminals, cards, reports and logs as text: nothing of them is done."""

from __future__ import annotations

import html
import io
import json
import logging
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from rich.console import Console
from scored_runs import hits, scored
from typer.testing import CliRunner

from moelora_cli.main import app
from moelora_plugin.errors import ConfigError
from moelora_plugin.export import export_adapter
from moelora_plugin.files import atomic_directory, sha256_of
from moelora_plugin.reports import compare_seeds
from moelora_plugin.reports.compare import read_runs
from moelora_plugin.tables import PlainTable, shown
from moelora_plugin.text import block, code, markdown, plain

POISON = (
    "[red]a[/red]",
    "[link=http://evil.example]b[/link]",
    ":skull: [/] [[",
    "\x1b[2J\x1b]8;;http://evil.example\x07c\x1b]8;;\x07",
    "\x1b]52;c;ZXZpbA==\x07d",
    "\x9b31me\x85f\x7f\x08\x08\r",
    "\u202eevil\u202c\u2066g\u2069",
    "h\nError: all is well\n| i | j |",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "![k](javascript:alert(1)) [l](javascript:alert(1)) https://evil.example www.evil.example",
    "m`n``o | p \\| q",
    "r\n---\nlicense: evil\n---\n# s",
    "t: u\nlicense: evil",
    "*v* _w_ ~~x~~ # y > z @someone $a$",
    "\ud800half",
    "\u2028line\u2029paragraph",
    "'\"><b>quote",
    "{{ 7 * 7 }} {% raw %}",
)
FORBIDDEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def harmless(text: str) -> None:
    assert not FORBIDDEN.findall(text), FORBIDDEN.findall(text)


def printed(*renderables: Any, width: int = 200) -> str:
    """What a terminal with colours gets; the styles of rich's own are taken out again."""
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    for renderable in renderables:
        console.print(renderable)
    return out.getvalue()


def poisoned_run(path: Path, name: str, **options: Any) -> Path:
    right = {"sst2": {"base": hits(20, 0.5, 0), name: hits(20, 0.9, 1)}}
    report = scored(right, experts=(name,), changes={"category": name}, **options)
    overlap = {name: {"sst2": 2}}
    report.details.update({"command": ["moelora", name], "began": name, "overlap": overlap})
    report.details["versions"] = {"moelora": name, "lm_eval": name}
    report.models[name] = {"path": name, "base": name, "device_name": name, "dtype": name}
    for used in report.predictions[name].values():
        used.expert_use[f"{name}.0.{name}"] = next(iter(used.expert_use.values()))
    content = report.to_dict()
    # By hand: parquet takes no halves of surrogates.
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    if not name.isprintable() and "\ud800" in name:
        return path
    report.write(path)
    return path


@pytest.mark.parametrize("name", POISON)
def test_texts(name: str) -> None:
    for show in (plain, markdown, code):
        assert "\n" not in show(name)
        assert "\t" not in show(name)
        harmless(show(name))
    harmless(block(f"{name}\n\t"))
    assert block(f"{name}\n\t").endswith("\n\t")
    assert len(plain(name)) == len(name)  # places in a text stay where they are
    unescaped = re.sub(r"\\([^A-Za-z0-9])", r"\1", markdown(name))
    assert html.unescape(unescaped) == plain(name)  # Markdown shows it as it is


@pytest.mark.parametrize("name", POISON)
def test_tables(name: str) -> None:
    table = PlainTable("one", name, title=name, caption=name)
    table.add_column(name, footer=plain(name))
    table.add_row(name, "x", name)
    table.add_row("a", shown(name, "bold"))
    text = printed(table)
    harmless(text)
    rows = [line for line in text.splitlines() if line.startswith(("│", "┃"))]
    assert len({len(_cells(row)) for row in rows}) == 1  # every line has the table's shape
    if name.startswith("["):
        assert plain(name) in text


def _cells(line: str) -> str:
    """The line in terminal cells."""
    return "".join(char * (2 if unicodedata.east_asian_width(char) in "WF" else 1) for char in line)


@pytest.mark.parametrize("name", POISON)
def test_errors_are_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = str(ConfigError(f"{name} is wrong."))
    harmless(said)
    assert "\n" not in said

    def fail(*_: object) -> None:
        raise ConfigError(f"{name} is wrong.")

    monkeypatch.setattr("moelora_plugin.analysis.inspect_adapter", fail, raising=False)
    result = CliRunner().invoke(app, ["inspect", "x"])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    harmless(line)


@pytest.mark.parametrize("name", POISON)
def test_reports_and_comparisons(tmp_path: Path, name: str) -> None:
    run = poisoned_run(tmp_path / "run" / "moelora_eval.json", name)
    page, table = tmp_path / "page.html", tmp_path / "scores.md"
    result = CliRunner().invoke(
        app, ["report", str(run), "--out", str(page), "--markdown", str(table)]
    )
    assert result.exit_code == 0, result.output
    text = page.read_text(encoding="utf-8")
    harmless(text)
    assert text.count("<script") == 2
    assert text.count("</script>") == 2
    assert text.count("<img") == 0
    assert "<b>quote" not in text
    assert "{{ 7" not in text or "{{ 7 * 7 }}" in text  # it is shown, not worked out
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert data["models"] == ["base", block(name)]

    lines = table.read_text(encoding="utf-8").splitlines()
    harmless("\n".join(lines))
    cells = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines if line.startswith("|")}
    assert cells == {8}
    assert not re.search(r"(?<!\\)<|(?<!\\)\]\(", "\n".join(lines))
    assert "://" not in "\n".join(lines)

    for arguments in (["compare", str(run)], ["compare", f"a={run}", f"b={run}"]):
        said = CliRunner().invoke(app, arguments)
        harmless(said.output)
        assert "\nError: all is well" not in said.output


@pytest.mark.parametrize("name", POISON)
def test_names_of_recipes_and_tables_of_runs(tmp_path: Path, name: str) -> None:
    for seed in range(2):
        poisoned_run(tmp_path / str(seed) / "moelora_eval.json", "adapter")
    runs = read_runs([f"x={tmp_path / str(seed)}" for seed in range(2)])
    result = compare_seeds({name: runs["x"]})
    harmless(printed(*result.tables(), width=100))
    report = scored({"sst2": {"base": [True], name: [False]}})
    report.details["overlap"] = {name: {"sst2": 1}}
    harmless(printed(report.table(), width=100))


@pytest.mark.parametrize("name", POISON)
def test_cards(work: Path, name: str) -> None:
    """Names in the manifest, of the base, and in the scores."""
    adapter = work / "adapter"
    manifest = json.loads((adapter / "moelora.json").read_text())
    manifest["recipe"] = {
        "data": {"tasks": [name, f"{name} "]},
        "optimizer": {"name": name, "lr": 1.0},
    }
    (adapter / "moelora.json").write_text(json.dumps(manifest))
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = name
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    scores = poisoned_run(work / "scores.json", name)
    content = json.loads(scores.read_text())
    digest = sha256_of(adapter / "adapter_model.safetensors")
    content["models"][name]["sha256"] = {"adapter_model.safetensors": digest}
    scores.write_text(json.dumps(content))
    result = export_adapter(adapter, work / "out", eval_file=scores)
    harmless(printed(result.table()))
    text = (work / "out" / "README.md").read_text(encoding="utf-8")
    harmless(text)
    front = text.partition("---\n")[2].partition("\n---\n")[0]
    assert set(yaml.safe_load(front)) <= {"base_model", "library_name", "tags"}
    assert set(ModelCard(text).data.to_dict()) <= {"base_model", "library_name", "tags"}
    body = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", body)  # code shows what it holds
    assert not re.search(r"<(?:script|img|b)", outside)
    assert "evil.example" not in re.sub(r"(?:&#58;|&#46;)\S*|\\\S*", "", outside)
    assert not re.search(r"(?<!\\)\]\((?!https://arxiv)", outside)
    inspected = CliRunner().invoke(app, ["inspect", "out"])
    assert inspected.exit_code == 0, inspected.output
    harmless(inspected.output)


def test_logs_have_a_line_for_each_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def write() -> None:
        with atomic_directory(tmp_path / "out", overwrite=True) as folder:
            (folder / "ours.txt").write_text("ours")

    write()
    (tmp_path / "out" / "x\nWARNING all is well\x1b[2J").write_text("mine")
    with caplog.at_level(logging.WARNING):
        write()
    (record,) = caplog.records
    assert "\n" not in record.getMessage()
    harmless(record.getMessage())


COMMANDS: dict[str, Callable[[str], list[str]]] = {
    "tasks": lambda name: ["tasks", name],
    "presets": lambda name: ["presets", name],
    "path": lambda name: ["path", name],
    "inspect": lambda name: ["inspect", name],
    "compare": lambda name: ["compare", name],
    "report": lambda name: ["report", name],
    "train": lambda name: ["train", name],
    "key": lambda name: ["train", "recipe.yaml", f"{name}=1"],
    "value": lambda name: ["train", "recipe.yaml", f"optimizer.name={json.dumps(name)}"],
    "init": lambda name: ["init", "trl", "--model", name],
    "export": lambda name: ["export", name, "--out", "out"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_commands_say_of_a_name(work: Path, command: str) -> None:
    for name in POISON:
        if "\ud800" in name:
            continue  # no command line can hold it
        result = CliRunner().invoke(app, COMMANDS[command](name))
        harmless(result.output)
        assert isinstance(result.exception, SystemExit | None), (name, result.exception)
