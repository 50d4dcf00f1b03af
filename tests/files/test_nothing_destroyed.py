"""Whatever a command is told to write, and wherever: no byte that is not ours is lost.

Every test looks at all files before and after. A file that was there must be there, at its place
or, where a new one of ours has that, under NAME.old; except those that we wrote and nobody changed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moelora_cli.main import app
from moelora_plugin.errors import ConfigError
from moelora_plugin.files import atomic_directory, write_text
from moelora_plugin.marks import MARK, own_files

FOLDERS = {  # commands that write a folder, by the option that names it
    "export adapter --out {}": "--out",
    "cluster recipe.yaml --num-clusters 2 --out {}": "--out",
    "init trl --out {}": "--out",
    "train recipe.yaml --output-dir {}": "output_dir",
    "demo --steps 1 --out {}": "--out",
}
FILES = {  # commands that write a file, likewise
    "report one --out {}": "--out",
    "report one --out page.html --markdown {}": "--markdown",
    "compare one two --output {}": "--output",
    "eval --adapter adapter --tasks sst2 --data-dir rows --output {}": "--output",
    "search guilomo recipe.yaml --out {}": "--out",
}


def contents(folder: Path) -> dict[str, bytes | str | None]:
    """Every file, link and folder by its path."""
    found: dict[str, bytes | str | None] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def run(command: str) -> str:
    """Run it, and give what it says; it must succeed."""
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.output
    return result.output


def refused(work: Path, command: str, *said: str) -> None:
    """One sentence with these parts, and nothing is touched."""
    before = contents(work)
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 1, result.output
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("Error: "))
    for part in said:
        assert part in line
    assert contents(work) == before


@pytest.fixture
def thesis(work: Path) -> Path:
    """Somebody's folder, with the names that ours like to have."""
    folder = work / "proj"
    for name in ("adapter/notes.txt", "checkpoints/checkpoint-1/optimizer.pt", "data/x.parquet"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"my {name}")
    for name in ("README.md", "recipe.yaml", "train.jsonl", "config.json", "moelora.json"):
        (folder / name).write_text(json.dumps({"mine": name}))
    return folder


@pytest.mark.parametrize("overwrite", ["", " --overwrite"])
@pytest.mark.parametrize("command", FOLDERS)
def test_a_folder_of_others_is_refused(
    work: Path, thesis: Path, command: str, overwrite: str
) -> None:
    said = ("proj already holds something", "README.md", FOLDERS[command])
    refused(work, command.format("proj") + overwrite, *said)
    (work / "link").symlink_to("proj")
    refused(work, command.format("link") + overwrite, "README.md", FOLDERS[command])


@pytest.mark.parametrize("command", FOLDERS)
def test_a_file_where_a_folder_is_expected(work: Path, command: str) -> None:
    (work / "file").write_text("mine")
    os.mkfifo(work / "pipe")
    for name in ("file", "pipe"):
        before = (work / name).stat()
        result = CliRunner().invoke(app, [*command.format(name).split(), "--overwrite"])
        assert result.exit_code == 1
        assert f"{name} is a file" in result.stderr
        assert (work / name).stat() == before


@pytest.mark.parametrize("content", [b"mine", b'{"mine": 1}', b'{"a": {"b": 1}}', b"| mine |\n"])
@pytest.mark.parametrize("command", FILES)
def test_a_file_of_others_is_refused(work: Path, command: str, content: bytes) -> None:
    (work / "mine.json").write_bytes(content)
    (work / "link.json").symlink_to("mine.json")
    for name in ("mine.json", "link.json"):
        said = (f"{name} already holds something", "not even --overwrite", FILES[command])
        refused(work, f"{command.format(name)} --overwrite", *said)


@pytest.mark.parametrize("command", FILES)
def test_what_is_no_file(work: Path, command: str) -> None:
    (work / "folder.json" / "moelora_eval.json").mkdir(parents=True)
    refused(work, f"{command.format('folder.json')} --overwrite", "is a folder", FILES[command])
    (work / "loop.json").symlink_to("loop.json")
    result = CliRunner().invoke(app, [*command.format("loop.json").split(), "--overwrite"])
    assert result.exit_code == 1
    assert "loop.json" in result.stderr
    assert FILES[command] in result.stderr
    device = os.stat("/dev/null")
    result = CliRunner().invoke(app, [*command.format("/dev/null").split(), "--overwrite"])
    assert result.exit_code == 1
    assert "/dev/null" in result.stderr
    assert os.stat("/dev/null").st_rdev == device.st_rdev


def test_documents_of_others_beside_an_evaluation(work: Path) -> None:
    """The file that goes with the JSON has a name that nobody typed."""
    (work / "scores_documents.parquet").write_text("mine")
    command = "eval --adapter adapter --tasks sst2 --data-dir rows --output scores.json"
    for overwrite in ("", " --overwrite"):
        refused(work, command + overwrite, "scores_documents.parquet already holds something")


def without_marks(folder: Path) -> None:
    """As versions before the mark left it."""
    for mark in folder.rglob(MARK):
        mark.unlink()


EXPORT, CLUSTER, INIT, TRAIN, _ = FOLDERS


@pytest.mark.parametrize(
    ("command", "is_marked"),
    [
        *[(command, True) for command in (EXPORT, CLUSTER, INIT, TRAIN)],
        # A config without a mark cannot be told from one that somebody wrote.
        *[(command, False) for command in (EXPORT, CLUSTER, TRAIN)],
    ],
)
def test_what_others_put_into_our_folder_stays(
    work: Path, trained: Path, command: str, is_marked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    out = work / "out"
    if command == TRAIN:
        shutil.copytree(trained, out)
    else:
        run(command.format("out"))
    if not is_marked:
        without_marks(out)
    ours = set(contents(out))
    mine = {"mine/deep/notes.txt": b"mine", "thesis.tex": b"mine too", "vocab.json.old": b"old"}
    for name, content in mine.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    (out / "data").symlink_to(work / "rows")  # a link must stay one, and what it leads to too
    rows = contents(work / "rows")
    with caplog.at_level(logging.WARNING):
        run(f"{command.format('out')} --overwrite")
    after = contents(out)
    assert {name: after[name] for name in mine} == mine
    assert after["data"] == str(work / "rows")
    assert contents(work / "rows") == rows
    kept = {f"{name}.old" for name in ours}
    assert set(after) - set(ours) <= {*mine, "mine", "mine/deep", "data", MARK, *kept} | {
        name for name in after if name.endswith(MARK)
    }
    if not command.startswith("train"):  # files are written into a run, which keeps its place
        assert "as moelora did not write it" in caplog.text
    assert not list(work.glob(".*"))


def test_a_file_of_ours_that_was_edited_is_kept(work: Path) -> None:
    run("export adapter --out out")
    card = work / "out" / "README.md"
    for number, text in (("", "my card"), ("2", "my other card")):
        card.write_text(text)
        run("export adapter --out out --overwrite")
        assert card.read_text() not in ("my card", "my other card")
        assert (work / "out" / f"README.md.old{number}").read_text() == text
    assert "README.md" in own_files(work / "out")
    assert "README.md.old" not in own_files(work / "out")


def test_a_mark_cannot_name_what_is_not_ours(work: Path) -> None:
    """Somebody else can have made the mark: of a folder that was downloaded, or edited."""
    run("export adapter --out out")
    mark = work / "out" / MARK
    content = json.loads(mark.read_text())
    (work / "out" / "mine.txt").write_text("mine")
    (work / "out" / "link").symlink_to(work / "rows")
    for name in ("mine.txt", "../recipe.yaml", str(work / "recipe.yaml"), "link/x", "..", ""):
        content["files"][name] = content["files"]["README.md"]
    mark.write_text(json.dumps(content))
    before = contents(work / "rows"), (work / "recipe.yaml").read_bytes()
    run("export adapter --out out --overwrite")
    assert (work / "out" / "mine.txt").read_text() == "mine"
    assert (contents(work / "rows"), (work / "recipe.yaml").read_bytes()) == before


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"files": []}', b"\xff", b"[" * 100_000])
def test_a_damaged_mark_loses_nothing(work: Path, damage: bytes) -> None:
    run("init trl --out out")
    before = contents(work / "out")
    (work / "out" / MARK).write_bytes(damage)
    result = CliRunner().invoke(app, ["init", "trl", "--out", "out", "--overwrite"])
    after = contents(work / "out")
    for name, content in before.items():
        if name != MARK:
            assert content in (after[name], after.get(f"{name}.old")), result.output


@pytest.mark.parametrize(
    ("out", "said"),
    [(".", "holds the current folder"), ("..", "holds"), ("adapter", "the folder of ADAPTER")],
)
def test_places_that_cannot_be_replaced(
    work: Path, out: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if out != "adapter":
        inner = work / "empty" / "inner"
        inner.mkdir(parents=True)
        monkeypatch.chdir(inner)
        shutil.copytree(work / "adapter", work.parent / "adapter")
        command = f"export {work.parent / 'adapter'} --out {out}"
    else:
        command = "export adapter --out adapter"
    before = contents(work)
    for overwrite in ("", " --overwrite"):
        if out == "adapter" and not overwrite:
            continue
        result = CliRunner().invoke(app, (command + overwrite).split())
        assert result.exit_code == 1, result.output
        assert said in result.stderr or "already holds something" in result.stderr
    assert contents(work) == before


def test_the_folder_around_the_input(work: Path) -> None:
    refused(work, f"export adapter --out {work} --overwrite", "already holds something")
    run("export adapter --out adapter/shared")  # inside of the input
    before = contents(work / "adapter")
    run("export adapter --out adapter/shared --overwrite")
    after = contents(work / "adapter")
    assert {n: c for n, c in after.items() if "shared" not in n} == {
        n: c for n, c in before.items() if "shared" not in n
    }


def test_a_link_is_written_through(work: Path) -> None:
    """As any program writes: the link stays, what it leads to is made or replaced."""
    (work / "disk").mkdir()
    for name in ("folder", "page.html"):
        (work / name).symlink_to(work / "disk" / name)  # not there yet
    run("export adapter --out folder")
    run("report one --out page.html")
    run("export adapter --out folder --overwrite")
    run("report one --out page.html --overwrite")
    for name in ("folder", "page.html"):
        assert (work / name).is_symlink()
    assert (work / "disk" / "folder" / "moelora.json").is_file()
    assert (work / "disk" / "page.html").read_bytes().startswith(b"<")
    assert not list((work / "disk").glob(".*"))


@pytest.mark.usefixtures("ran")
def test_a_run_that_fails_leaves_the_one_before(work: Path) -> None:
    before = contents(work / "run")
    broken = "train recipe.yaml --overwrite optimizer.lr=1e30 optimizer.gate_lr=1e30"
    result = CliRunner().invoke(app, broken.split())
    assert result.exit_code == 1, result.output
    after = contents(work / "run")
    for name, content in before.items():
        if name != MARK:
            aside = name.replace("checkpoints/", "checkpoints.old/")
            assert content in (after.get(name), after.get(aside)), name


@pytest.mark.usefixtures("ran")
def test_a_run_with_files_of_others_among_its_checkpoints(work: Path) -> None:
    for folder in ("checkpoint-2", "checkpoint-77"):
        (work / "run" / "checkpoints" / folder).mkdir(exist_ok=True)
        (work / "run" / "checkpoints" / folder / "mine.txt").write_text("mine")
    (work / "run" / "recipe.yaml").write_text("mine")
    run("train recipe.yaml training.max_steps=1 --overwrite")
    assert [path.name for path in (work / "run" / "checkpoints").iterdir()] == ["checkpoint-1"]
    kept = contents(work / "run" / "checkpoints.old")
    assert {name for name, content in kept.items() if content is not None} == {
        "checkpoint-2/mine.txt",
        "checkpoint-77/mine.txt",
    }
    assert (work / "run" / "recipe.yaml.old").read_text() == "mine"


@pytest.mark.usefixtures("ran", "thesis")
def test_going_on_from_a_checkpoint_elsewhere_asks_before_it_writes(work: Path) -> None:
    checkpoint = "run/checkpoints/checkpoint-1"
    for overwrite in ("", " --overwrite"):
        command = f"train recipe.yaml --output-dir proj --resume {checkpoint}{overwrite}"
        refused(work, command, "proj already holds something")
    run(f"train recipe.yaml --resume {checkpoint}")  # its own run needs no --overwrite
    assert not list((work / "run").glob("*.old"))


def test_a_demo_keeps_the_rows_of_others(work: Path, thesis: Path) -> None:
    (thesis / "data" / "glue_sst2").mkdir()
    shutil.copy(work / "rows/glue_sst2/train.parquet", thesis / "data/glue_sst2/train.parquet")
    refused(work, "demo --out proj --steps 1 --overwrite", "proj already holds something")


@pytest.mark.parametrize("where", ["block", "rename"])
def test_the_old_folder_comes_back(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with atomic_directory(out) as folder:
        write_text(folder / "a.txt", "old")
    (out / "mine.txt").write_text("mine")
    before = contents(tmp_path)
    rename: Callable[..., Path] = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if where == "rename" and self.suffix == ".partial":
            raise OSError("the disk is gone")
        return rename(self, target)

    def write() -> None:
        with atomic_directory(out, overwrite=True) as folder:
            write_text(folder / "a.txt", "new")
            if where == "block":
                raise OSError("the disk is full")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="the disk"):
        write()
    assert contents(tmp_path) == before


def test_two_writers_do_not_share_a_temporary_name(tmp_path: Path) -> None:
    (tmp_path / ".x.json.partial").write_text("mine")
    write_text(tmp_path / "x.json", "text")
    assert (tmp_path / ".x.json.partial").read_text() == "mine"
    with atomic_directory(tmp_path / "a") as one, atomic_directory(tmp_path / "b") as other:
        assert one != other


def test_what_came_in_the_meantime_is_refused_or_kept(tmp_path: Path) -> None:
    """A folder that was free at the start and is not at the end."""
    out = tmp_path / "out"
    with atomic_directory(out) as folder:
        write_text(folder / "a.txt", "ours")
        out.mkdir()
        (out / "a.txt").write_text("mine")
    assert (out / "a.txt").read_text() == "ours"
    assert (out / "a.txt.old").read_text() == "mine"
    with pytest.raises(ConfigError, match="pass --overwrite"), atomic_directory(out):
        pass
