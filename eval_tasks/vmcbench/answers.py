"""The answer that a model gives to a question of VMCBench, found as the official code finds it.

The rules are those of `parse_multi_choice_response`, which MMMU's evaluation code began and which
lmms-eval and VLMEvalKit use for VMCBench, in our own words.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence

PUNCTUATION = ",.!?;:'"  # taken off both ends, one kind after the other
LONG = 5  # words; only a longer answer is searched for an option's text


def find_letter(text: str, options: Sequence[str]) -> int | None:
    """The option that an answer names.

    Looked for in this order: a letter as "(B)" or "B. ", a letter between spaces, and in an answer
    of more than five words the text of an option, upper or lower case. Of several options found in
    one way, that which stands last counts; where several letters stand only as "B. ", the first of
    them in the alphabet does, as the official code looks for the last "(B)" alone.

    Args:
        text: what the model wrote.
        options: texts of the options.

    Returns:
        The option's index, or None where none is named. The official code then guesses.
    """
    for mark in PUNCTUATION:
        text = text.strip(mark)
    text = f" {text} "
    letters = string.ascii_uppercase[: len(options)]

    marked = [letter for letter in letters if f"({letter})" in text or f"{letter}. " in text]
    if marked:
        return letters.index(_last({letter: text.rfind(f"({letter})") for letter in marked}))
    alone = [letter for letter in letters if f" {letter} " in text]
    if alone:
        return letters.index(_last({letter: text.rfind(f" {letter} ") for letter in alone}))
    text = text.lower()
    if len(text.split()) > LONG:
        places = {
            letter: text.rfind(option.lower())
            for letter, option in zip(letters, options, strict=True)
            if option.lower() in text
        }
        if places:
            return letters.index(_last(places))
    return None


def _last(places: Mapping[str, int]) -> str:
    return max(places, key=lambda letter: places[letter])  # the first of equals
