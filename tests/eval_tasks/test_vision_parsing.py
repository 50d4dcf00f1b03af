"""Answers to VMCBench, as its official code reads them."""

from __future__ import annotations

import pytest

from moelora_eval_tasks.catalog import TASKS
from moelora_eval_tasks.parsing import MISS, PARSERS

OPTIONS = ("a red house", "a tree", "two dogs", "a lake")
A, B, C, D = range(4)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        # A letter in brackets or before a full stop and a space.
        ("(B)", B),
        ("The answer is (C).", C),
        ("(A) is wrong, so it must be (D)", D),
        ("(A) or (B)? On reflection (A)", A),
        ("B. a tree", B),
        ("Answer: D. It shows a lake", D),
        # Marked letters go before those that stand alone, wherever they are.
        ("(B) or rather C I think", B),
        # A letter that stands alone, with the punctuation at both ends taken off.
        ("B", B),
        ("B.", B),
        ("'C'", C),
        ("D?!", D),
        ("D!?", MISS),  # a mark is taken off once, and "!" comes before "?"
        (",.!?;:'A':;?!.,", A),
        ("It is B", B),
        ("either A or B", B),
        ("A B C D C", C),
        # Where no letter is found, more than five words are searched for an option's text.
        ("I see a lake and beside it a tree", B),
        ("HERE IS MY ANSWER: ITS TWO DOGS", C),
        ("I SEE A TREE AND BESIDE IT A LAKE", A),  # a letter that stands alone
        ("there is a tree, then a lake, then a tree", B),
        ("in the picture there are two dogs running", C),
        # Several letters with full stops: the first in the alphabet, as in the official code.
        ("C. no, B. yes", B),
        ("(A) A. or D. what", A),
        # Nothing to be found.
        ("", MISS),
        ("two dogs", MISS),
        ("I see two dogs there", MISS),
        ("nothing in this picture tells me at all", MISS),
        ("b", MISS),
        ("(E)", MISS),
        ("BC", MISS),
        ("A:B", MISS),
    ],
)
def test_the_official_rules(text: str, found: int) -> None:
    assert PARSERS["vmcbench"](TASKS["vmcbench_gen"], text, OPTIONS) == found


@pytest.mark.parametrize("name", ["vmcbench_paper", "visual7w_paper", "visual7w_gen"])
@pytest.mark.parametrize(
    ("text", "found"),
    [
        (" The answer is B.", B),
        ("The answer is B.", B),
        ("The answer is D", D),
        ("The answer is B. The answer is B.", MISS),
        ("The answer is E.", MISS),
        ("B", MISS),
        ("(B)", MISS),
    ],
)
def test_the_papers_rule(name: str, text: str, found: int) -> None:
    task = TASKS[name]
    assert PARSERS[task.parser](task, text, OPTIONS) == found
