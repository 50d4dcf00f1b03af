"""Mutants of configs, weights, manifests, recipes and reports through every loader and command.

    PYTHONPATH=tests python -m fuzzing.run --mutants 5000 --minutes 10 --seed 0
    PYTHONPATH=tests python -m fuzzing.run --only 1234      # one mutant again, with all it printed

Each mutant is read in a process of its own under limits of time and memory, in a working directory
full of canaries. The last four columns of the table have to be empty:

    refused        one of our errors, in one sentence (or, where we have no part, the library's own)
    same           the answer of the whole artefact
    warned         another answer, with a warning
    shown          another text or resolved recipe, of commands that show what a file says
    silent         another answer without a word
    traceback      any other error, out of memory, or a crash
    code run       a command, a call or an import that the file asked for
    opened         a file or connection outside of the artefact, the base and the code
    hang           more than its time
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import unicodedata
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from . import artefacts as made
from . import child
from .mutations import Mutant, Poison, mutate, remove
from .targets import READERS, Target

OUTCOMES = (
    "refused",
    "same",
    "warned",
    "shown",
    "silent",
    "traceback",
    "code run",
    "opened",
    "hang",
)
FORBIDDEN = frozenset(OUTCOMES[4:])
_SECONDS = 60  # of wall time, on a machine that has other work; processor time is bounded apart
_TOLERANCE = 1e-6  # of logits near 1 in fp32: a fold or another order of additions


@dataclass(frozen=True)
class Case:
    """Which artefact a mutant is made of and who reads it, both by its number."""

    number: int
    artefact: str
    reader: str
    target: Target

    @classmethod
    def of(cls, seed: int, number: int) -> Case:
        """By weight: most are adapters, whose readers take turns."""
        rng = random.Random(f"case {seed} {number}")
        names = [n for n in READERS for _ in range(4 if n.startswith("adapter") else 3)]
        name = rng.choice(names)
        readers = READERS[name][1]
        # What takes a second or two comes up less often.
        slow = {"moelora export --to merged": 1, "moelora eval": 1, "moelora plan": 1}
        reader = rng.choice([r for r in readers for _ in range(slow.get(r, 8))])
        return cls(number, name, reader, readers[reader])


class Fuzzer:
    """Runs cases, two at a time, and judges them."""

    def __init__(self, seed: int, folder: Path, workers: int) -> None:
        self.seed = seed
        self.folder = folder
        self.workers = workers
        self.artefacts = made.make(folder / "whole")
        self.whole: dict[tuple[str, str], Any] = {}
        self.running: dict[int, tuple[Case, Mutant, Path, float]] = {}
        self.counts: Counter[tuple[str, str]] = Counter()
        self.findings: list[str] = []

    def start(self, case: Case, *, whole: bool = False) -> None:
        """Make the mutant and fork the process that reads it."""
        place = self.folder / f"{case.number}{'-whole' if whole else ''}"
        place.mkdir()
        copied = made.copy(self.artefacts, case.artefact, place)
        mutant = Mutant("nothing")
        if not whole:
            rng = random.Random(f"mutant {self.seed} {case.number}")
            by_person = case.artefact in ("recipe", "allocation")
            poison = Poison(self.artefacts.canary, by_person, not case.target.is_ours)
            mutant = mutate(copied, READERS[case.artefact][0], rng, poison)
        pid = os.fork()
        if pid == 0:
            child.run(case.target, copied, self.artefacts, place / "result.json")
        self.running[pid] = (case, mutant, place, time.monotonic())

    def wait(self) -> list[tuple[Case, Mutant, dict[str, Any]]]:
        """The cases that have ended since, with their records; those out of time are killed."""
        ended = []
        for pid, (case, mutant, place, began) in list(self.running.items()):
            late = time.monotonic() - began > _SECONDS
            if late:
                os.kill(pid, signal.SIGKILL)
            done, status = os.waitpid(pid, 0 if late else os.WNOHANG)
            if not done:
                continue
            del self.running[pid]
            record = self._record(place, status, late)
            ended.append((case, mutant, record))
            remove(place)
        return ended

    def _record(self, place: Path, status: int, late: bool) -> dict[str, Any]:
        file = place / "result.json"
        if late or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
            return {"outcome": "hang", "watched": []}
        if not file.exists():
            return {"outcome": "traceback", "message": f"ended with {status}", "watched": []}
        record: dict[str, Any] = json.loads(file.read_text())
        return record

    def judge(self, case: Case, mutant: Mutant, record: dict[str, Any]) -> str:
        """Which column a case belongs to."""
        watched = {kind for kind, _ in record["watched"]}
        if "ran" in watched or (self.artefacts.canary / "RAN").exists():
            (self.artefacts.canary / "RAN").unlink(missing_ok=True)
            return "code run"
        if "opened" in watched:
            return "opened"
        outcome = record["outcome"]
        if outcome == "refused by the library":
            return "refused"
        if outcome == "refused":
            return "refused" if _is_sentence(record["message"]) else "traceback"
        if outcome != "answered":
            return "hang" if outcome == "hang" else "traceback"
        if not _is_plain(record.get("shown", "")):
            return "code run"
        if _same(record["answer"], self.whole[case.artefact, case.reader]):
            return "same"
        if not case.target.compares:
            return "shown"
        if record["warned"]:
            return "warned"
        # A stock loader reads weights of the right names and shapes as they are: PEFT's format has
        # no digest of them. Ours compares the manifest's.
        return "shown" if mutant.keeps_form and not case.target.is_ours else "silent"

    def tally(self, case: Case, mutant: Mutant, record: dict[str, Any]) -> str:
        """Count a case, and keep what must not be."""
        column = self.judge(case, mutant, record)
        self.counts[case.reader, column] += 1
        if column in FORBIDDEN:
            more = str(record.get("message") or record["watched"] or record.get("shown", ""))
            head = f"#{case.number} {case.artefact} -> {case.reader}: {column}"
            self.findings.append(f"{head}\n  {mutant.what:.300}\n  {more[-600:]!r}")
        return column

    def answers_of_whole(self) -> None:
        """Read every whole artefact with every reader: what mutants are compared with."""
        number = -1
        for artefact, (_, readers) in READERS.items():
            for reader, target in readers.items():
                self.start(Case(number, artefact, reader, target), whole=True)
                number -= 1
                while len(self.running) >= self.workers:
                    self._keep_whole()
        while self.running:
            self._keep_whole()

    def _keep_whole(self) -> None:
        for case, _, record in self.wait():
            # A block does not merge, say: then its mutants do not either.
            if record["outcome"] not in ("answered", "refused") or record["watched"]:
                sys.exit(f"The whole {case.artefact} is not read by {case.reader}: {record}")
            self.whole[case.artefact, case.reader] = record.get("answer")
        time.sleep(0.002)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other) == 2:
        (_, a), (_, b) = one, other
        return len(a) == len(b) and all(abs(x - y) <= _TOLERANCE for x, y in zip(a, b, strict=True))
    return bool(one == other)


def _is_sentence(message: str) -> bool:
    """One line that a terminal shows as it is, of a length that somebody reads."""
    lines = [line for line in message.strip().splitlines() if line.strip()]
    return bool(lines) and len(message) < 4000 and "Traceback" not in message and _is_plain(message)


def _is_plain(text: str) -> bool:
    """Whether a terminal takes no command from the text."""
    return all(c in "\n\t\r" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") for c in text)


def main() -> None:
    """Run, show the table, and exit with 1 where a column that must be empty is not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mutants", type=int, default=5000)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--only", type=int, help="the number of one mutant, to look at")
    parser.add_argument("--json", type=Path, help="write counts and findings here too")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    with tempfile.TemporaryDirectory(prefix="moelora-fuzz-") as folder:
        fuzzer = Fuzzer(given.seed, Path(folder), given.workers)
        fuzzer.answers_of_whole()
        if given.only is not None:
            _show_one(fuzzer, given.only)
            return
        done = _run(fuzzer, given.mutants, given.minutes)
    _show(fuzzer, done, given.mutants)
    if given.json:
        counts = [[*key, n] for key, n in sorted(fuzzer.counts.items())]
        given.json.write_text(json.dumps({"counts": counts, "findings": fuzzer.findings}, indent=2))
    sys.exit(bool(fuzzer.findings) or done < given.mutants)


def _run(fuzzer: Fuzzer, mutants: int, minutes: float) -> int:
    ends = time.monotonic() + 60 * minutes
    number = done = 0
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("Mutants", total=mutants)
        while fuzzer.running or (number < mutants and time.monotonic() < ends):
            while len(fuzzer.running) < fuzzer.workers and number < mutants:
                fuzzer.start(Case.of(fuzzer.seed, number))
                number += 1
            for case, mutant, record in fuzzer.wait():
                fuzzer.tally(case, mutant, record)
                done += 1
                progress.advance(bar)
            time.sleep(0.002)
    return done


def _show_one(fuzzer: Fuzzer, number: int) -> None:
    case = Case.of(fuzzer.seed, number)
    fuzzer.start(case)
    while not (ended := fuzzer.wait()):
        time.sleep(0.01)
    ((case, mutant, record),) = ended
    record.pop("answer", None)
    print(
        case.artefact,
        case.reader,
        mutant.what,
        fuzzer.tally(case, mutant, {**record, "answer": None}),
    )
    print(json.dumps(record, indent=2)[:6000].replace("\\n", "\n"))


def _show(fuzzer: Fuzzer, done: int, wanted: int) -> None:
    table = Table(title=f"{done} of {wanted} mutants, seed {fuzzer.seed}")
    table.add_column("reader")
    for outcome in OUTCOMES:
        table.add_column(outcome, justify="right")
    readers = list(dict.fromkeys(r for _, readers in READERS.values() for r in readers))
    for reader in readers:
        table.add_row(reader, *(str(fuzzer.counts[reader, o] or "") for o in OUTCOMES))
    totals = [sum(fuzzer.counts[reader, o] for reader in readers) for o in OUTCOMES]
    table.add_section()
    table.add_row("all", *map(str, totals))
    console = Console(width=150)
    for finding in fuzzer.findings[:40]:
        console.print(finding, markup=False, highlight=False, soft_wrap=True)
    console.print(table)


if __name__ == "__main__":
    main()
