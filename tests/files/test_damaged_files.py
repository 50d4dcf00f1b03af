"""Files that others made or that broke: one sentence that names the file, never a traceback.

Each value of each file is put to the wrong types in turn, and each file to what is no file of its
kind. A command may answer with its result where what was changed is not read; it may not fail in
any other way than by its own sentence.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moelora_cli.main import app
from moelora_plugin.analysis import inspect_adapter
from moelora_plugin.clusters import ClusterAssigner
from moelora_plugin.errors import AdapterError, ConfigError, MoeLoraError
from moelora_plugin.export import export_adapter
from moelora_plugin.reports import compare, write_reports
from moelora_plugin.reports.compare import read_runs
from moelora_plugin.training import load_recipe

EVALUATION = "one/moelora_eval.json"
# Commands that read a file that anybody can have made: one for each reader, then more of them.
READERS = {
    "report one --out page.html --markdown page.md": EVALUATION,
    "inspect adapter": "adapter/moelora.json",
    "export adapter --out out2": "adapter/adapter_config.json",
    "train recipe.yaml": "recipe.yaml",
    "init trl --out out --data rows.jsonl": "rows.jsonl",
}
MORE_READERS = {
    "compare one two": EVALUATION,
    "compare a=one a=two": EVALUATION,
    "export adapter --out out --eval-file one": EVALUATION,
    "export adapter --out out": "adapter/moelora.json",
    "plan recipe.yaml": "recipe.yaml",
    "cluster recipe.yaml --num-clusters 2 --out out": "recipe.yaml",
    "search guilomo recipe.yaml --out out.json": "recipe.yaml",
}


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def binary(path: Path) -> None:
    path.write_bytes(bytes(range(256)))


def nested(path: Path) -> None:
    path.write_bytes(b"[" * 100_000)


def closed(path: Path) -> None:
    path.write_bytes(b'{"a":' * 500 + b"1" + b"}" * 500)


def text(path: Path) -> None:
    path.write_bytes(b'"a text"')


def number(path: Path) -> None:
    path.write_bytes(b"9" * 5000)


def null(path: Path) -> None:
    path.write_bytes(b"null")


def a_list(path: Path) -> None:
    path.write_bytes(b"[1, 2]")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


NO_FILES: list[Callable[[Path], None]] = [
    *(empty, truncated, binary, nested, closed, text, number, null, a_list),
    *(folder, pipe, device, circle),
]


@pytest.mark.parametrize(
    ("command", "file", "damage"),
    [
        *[(*reader, damage) for reader in READERS.items() for damage in NO_FILES],
        *[(*reader, damage) for reader in MORE_READERS.items() for damage in (null, pipe)],
    ],
)
def test_what_is_no_file_of_its_kind(
    work: Path, command: str, file: str, damage: Callable[[Path], None]
) -> None:
    (work / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    path = work / file
    damage(path)
    result = CliRunner().invoke(app, command.split())
    if path.name == "moelora.json" and result.exit_code == 0:
        assert damage in (folder, pipe, device, circle)  # an adapter may do without
        return
    assert result.exit_code == 1, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit), result.exception
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("Error: "))
    assert path.name in line or (file, damage) == ("recipe.yaml", truncated)  # YAML all the same
    assert line.endswith((".", "?"))
    assert len(line) < 600
    assert not (work / "out").exists()


WRONG: list[Any] = [
    *(None, True, -1, 10**400, 1e308, float("nan"), float("inf"), "x", "", [], {}, [[]], {"a": {}}),
    *([None], "\ud800\x1b[31m", ["x"] * 3),
]


def places(value: Any, most: int = 3) -> Iterator[tuple[Any, ...]]:
    """Every place in nested values; of long lists and mappings the first few."""
    children = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    for key, child in children[:most] if isinstance(value, list) else children:
        yield (key,)
        if isinstance(child, (dict, list)):
            yield from ((key, *rest) for rest in places(child, most))


def changed(content: Any, place: tuple[Any, ...], wrong: Any) -> Any:
    content = copy.deepcopy(content)
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    if wrong is KeyError:
        del inner[place[-1]]
    else:
        inner[place[-1]] = wrong
    return content


def sentence_or_success(act: Callable[[], object]) -> bool:
    """Whether it worked; anything but an error of ours is a failure of the test."""
    said = "."
    try:
        act()
    except MoeLoraError as error:
        said = f"{error}"
    assert said.endswith((".", "?"))
    assert len(said) < 700
    return said == "."


def test_every_value_of_an_evaluation(work: Path) -> None:
    file = work / EVALUATION
    content = json.loads(file.read_text())
    for digests in ("eval_tasks_sha256", "protocols", "datasets"):
        content.pop(digests, None)  # nobody reads them
    for used in content["expert_use"]["adapter"].values():
        for name in list(used)[1:]:
            del used[name]
    page, table = work / "page.html", work / "page.md"

    def read() -> None:
        read_runs([str(file)])

    def show() -> None:
        write_reports([str(file)], page, table, documents=3, overwrite=True)
        compare({"run": read_runs([str(file)])["one"][0]})

    refused = shown = 0
    for number, place in enumerate(places(content)):
        # Each place meets some of the wrong values, and all values meet most of the places' kinds.
        for wrong in (KeyError, WRONG[number % len(WRONG)], WRONG[(5 * number + 3) % len(WRONG)]):
            file.write_text(json.dumps(changed(content, place, wrong)))
            if not sentence_or_success(read):
                refused += 1
            elif number % 7 == 0:  # pages and statistics take their time
                shown += 1
                sentence_or_success(show)
    assert refused > 300
    assert shown > 10  # where one value has become another that may stand there


def test_the_sentence_names_the_place(work: Path) -> None:
    file = work / EVALUATION
    content = json.loads(file.read_text())
    wrong = changed(content, ("tasks", "sst2", "metrics", "adapter", "acc", "value"), "ten")
    file.write_text(json.dumps(wrong))
    said = r"moelora_eval.json.*: tasks\.sst2\.metrics\.adapter\.acc\.value is 'ten', but a number"
    with pytest.raises(ConfigError, match=said):
        read_runs([str(file)])


def test_documents_in_another_place(work: Path) -> None:
    """The JSON names the file: it may only be one beside it."""
    file = work / EVALUATION
    content = json.loads(file.read_text())
    for name in ("../two/moelora_eval_documents.parquet", str(work / "x"), "..", "", "/dev/zero"):
        file.write_text(json.dumps(changed(content, ("documents", "file"), name)))
        with pytest.raises(ConfigError, match=r"documents\.file"):
            read_runs([str(file)])


def test_every_value_of_a_manifest(work: Path, ran: Path) -> None:
    file = ran / "adapter" / "moelora.json"
    content = json.loads(file.read_text())
    for name in list(content["routing"])[1:]:
        del content["routing"][name]
    # The first is of the loader, which tests/adapter has; the others are read by nobody.
    read = content.keys() - {"base_fingerprint", "packages", "image_processor"}

    def show() -> None:
        inspect_adapter(file.parent).table()
        export_adapter(file.parent, work / "out", overwrite=True)

    for number, place in enumerate(places(content)):
        if place[0] in read:
            wrong = WRONG[number % len(WRONG)] if number % 3 else KeyError
            file.write_text(json.dumps(changed(content, place, wrong)))
            sentence_or_success(show)


def test_every_value_of_a_recipe(work: Path) -> None:
    content = json.loads(json.dumps(load_recipe(work / "recipe.yaml").to_dict()))
    file = work / "changed.yaml"
    for number, place in enumerate(places(content)):
        for wrong in (KeyError, WRONG[number % len(WRONG)], WRONG[(3 * number + 1) % len(WRONG)]):
            file.write_text(json.dumps(changed(content, place, wrong)))  # JSON is YAML
            sentence_or_success(lambda: load_recipe(file))


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "content",
    [
        *(LAUGHS, MERGES, "adapter: &a [*a]", "adapter: &a {b: *a}", "a: b: c", "a: [", "\t"),
        *("1: {2: 3}", "adapter: {1: 2}", "data: {tasks: {1: 1.0}}", "[a, b]: c", "? {a: b}\n: c"),
        *(f"seed: {'9' * 5000}", "seed: 2024-13-45", "seed: 0o9", "a: !!python/object:os.x {}"),
        *(
            "--- {}\n--- {}",
            "a: \x00",
            "a: \x1b[31m",
            "training: " + "[" * 5000,
            "extends: /dev/zero",
        ),
        *(
            "model: {name: 5}",
            "seed: -1",
            f"seed: {2**64}",
            "data: {tasks: [sst2], max_length: 9e99}",
        ),
    ],
)
def test_recipes_that_would_grow_or_break(work: Path, content: str) -> None:
    (work / "recipe.yaml").write_text(content)
    result = CliRunner().invoke(app, ["train", "recipe.yaml"])
    assert result.exit_code == 1
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("Error: "))
    assert line.endswith((".", "?"))
    assert len(line) < 800


def test_anchors_of_a_normal_size_are_read(work: Path) -> None:
    text = (work / "recipe.yaml").read_text()
    anchored = text.replace("tasks:\n  - sst2", "tasks: &tasks [sst2]")
    (work / "recipe.yaml").write_text(anchored + "early_stopping: null\n")
    assert load_recipe(work / "recipe.yaml").data.tasks == ["sst2"]


@pytest.mark.parametrize(
    "override",
    ["x" * 5000 + "=1", ".".join("a" * 5000) + "=1", "seed=[[", "seed=" + "9" * 5000],
)
def test_overrides_that_are_too_much(work: Path, override: str) -> None:
    with pytest.raises(ConfigError):
        load_recipe(work / "recipe.yaml", [override])


def test_every_value_of_a_cluster_file(work: Path) -> None:
    result = CliRunner().invoke(
        app, ["cluster", "recipe.yaml", "--num-clusters", "2", "--out", "clusters"]
    )
    assert result.exit_code == 0, result.output
    file = work / "clusters" / "clusters.json"
    content = json.loads(file.read_text())
    base = ClusterAssigner.load(work / "clusters").features.base
    for place in [(key,) for key in content] + [("sizes", 0)]:
        for wrong in [KeyError, *WRONG]:
            if place[0] in ("method", "base_fingerprint", "data"):
                continue  # a name to look up, what the loader compares, and what nobody reads
            file.write_text(json.dumps(changed(content, place, wrong)))
            sentence_or_success(lambda: ClusterAssigner.load(work / "clusters", base))
    for damage in NO_FILES:
        if file.is_dir():
            file.rmdir()
        else:
            file.unlink(missing_ok=True)
        file.write_text(json.dumps(content))
        damage(file)
        with pytest.raises(AdapterError, match=r"clusters\.json"):
            ClusterAssigner.load(work / "clusters", base)
