r"""Regular expressions in configurations: whether they are such, and what they may cost.

Python matches by trying: `(a+)+$` on thirty letters takes hours. A pattern that a person writes is
that person's; one in a saved file is a stranger's, and is refused where it could try too much. The
measure is an upper bound on the ways in which the pattern can go along a name: a choice that the
next character settles counts once, any other by the number of its branches, an open repeat by the
length of a name. Four `.*` pass; a repeat in a repeat passes where only one way leads through it
(`(\w+\.)*q_proj`).
"""

from __future__ import annotations

import importlib
import math
import re
import sys
import warnings
from typing import Any

from .errors import ConfigError
from .values import shown

# Modules' names are rarely longer; a repeat has as many choices.
_NAME = 64
_MAX_WAYS = 2e7  # four open repeats

# Characters as numbers; all beyond ASCII are one.
_ALL = frozenset(range(129))
_OTHER = frozenset({128})
_ANCHORS = ("AT", "ASSERT", "ASSERT_NOT")


def require_pattern(key: str, pattern: str, matched: str | None = None) -> None:
    """Refuse what is no regular expression.

    Args:
        key: where it stands.
        pattern: the expression.
        matched: what is made of it to match by, where that is more.

    Raises:
        ConfigError: naming the key.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern if matched is None else matched)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{key} has the pattern {shown(pattern)}, which is no regular expression: {error}."
        ) from error


def require_cheap(key: str, pattern: str, matched: str | None = None) -> None:
    """Refuse what is no regular expression, or one that could take very long on some name.

    Args:
        key: where it stands.
        pattern: the expression.
        matched: what is made of it to match by, where that is more.

    Raises:
        ConfigError: naming the key.
    """
    require_pattern(key, pattern, matched)
    if ways(pattern if matched is None else matched) > _MAX_WAYS:
        raise ConfigError(
            f"{key} has the pattern {shown(pattern)}, which can match in so many ways that trying "
            "them could take for ever, so it is not taken from a saved file; write names in its "
            "place."
        )


def whole_name(expression: str) -> str:
    """The pattern of whole names that a pattern of their last parts stands for."""
    return rf"(.*\.)?({expression})"


def ways(pattern: str) -> float:
    """An upper bound on the ways that matching tries from one place in a name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parsed = _parser().parse(pattern)
    fold = bool(parsed.state.flags & re.IGNORECASE)
    try:
        return _sequence(list(parsed), frozenset(), fold)
    except (OverflowError, RecursionError):
        return math.inf


def _parser() -> Any:
    """The parser of the standard library's `re`, whose module was renamed in Python 3.11."""
    return importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")


def _sequence(items: list[Any], follow: frozenset[int], fold: bool) -> float:
    """Ways through one item after the other, `follow` being what may come next."""
    product = 1.0
    for item in reversed(items):
        product *= _item(item, follow, fold)
        first, nullable = _first([item], fold)
        follow = first | follow if nullable else first
    return product


def _item(item: Any, follow: frozenset[int], fold: bool) -> float:
    name, value = str(item[0]), item[1]
    if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        least, most, body = value
        return _repeat(int(least), int(most), list(body), follow, fold)
    if name == "BRANCH":
        return _branches([list(branch) for branch in value[1]], follow, fold)
    if name == "SUBPATTERN":
        inner_fold = fold or bool(value[1] & re.IGNORECASE)
        return _sequence(list(value[3]), follow, inner_fold)
    if name == "ATOMIC_GROUP":
        return _sequence(list(value), follow, fold)
    if name in ("ASSERT", "ASSERT_NOT"):
        return _sequence(list(value[1]), frozenset(), fold)
    if name == "GROUPREF_EXISTS":
        return _branches([list(value[1]), list(value[2] or [])], follow, fold)
    return 1.0


def _branches(branches: list[list[Any]], follow: frozenset[int], fold: bool) -> float:
    """The most of them where the next character says which it is, else all of them."""
    costs = [_sequence(branch, follow, fold) for branch in branches]
    starts = [_start(branch, follow, fold) for branch in branches]
    apart = sum(map(len, starts)) == len(frozenset().union(*starts))
    return max(costs) if apart else sum(costs)


def _repeat(least: int, most: int, items: list[Any], follow: frozenset[int], fold: bool) -> float:
    first, nullable = _first(items, fold)
    inside = _sequence(items, first | follow, fold)
    rounds = min(most, _NAME)
    if inside == 1.0:
        # One way through the body: what is left to choose is when to stop.
        settled = not nullable and not first & follow
        return 1.0 if settled else float(min(most - least, _NAME) + 1)
    if nullable or most >= _NAME:
        return math.inf if most > 1 else inside + 1.0
    return float(sum(inside**count for count in range(min(least, rounds), rounds + 1)))


def _start(items: list[Any], follow: frozenset[int], fold: bool) -> frozenset[int]:
    first, nullable = _first(items, fold)
    return first | follow if nullable else first


def _first(items: list[Any], fold: bool) -> tuple[frozenset[int], bool]:
    """The characters that a match may begin with, and whether it may be empty."""
    found: frozenset[int] = frozenset()
    for item in items:
        first, nullable = _first_of(item, fold)
        found |= first
        if not nullable:
            return found, False
    return found, True


def _first_of(item: Any, fold: bool) -> tuple[frozenset[int], bool]:
    name, value = str(item[0]), item[1]
    if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        first, nullable = _first(list(value[2]), fold)
        return first, nullable or value[0] == 0
    if name == "BRANCH":
        parts = [_first(list(branch), fold) for branch in value[1]]
        return frozenset().union(*(first for first, _ in parts)), any(n for _, n in parts)
    if name == "SUBPATTERN":
        return _first(list(value[3]), fold or bool(value[1] & re.IGNORECASE))
    if name == "ATOMIC_GROUP":
        return _first(list(value), fold)
    if name in _ANCHORS:
        return frozenset(), True
    if name in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
        return _characters(name, value, fold), False
    return _ALL, True  # back-references: anything


def _characters(name: str, value: Any, fold: bool) -> frozenset[int]:
    """The characters that one item of a pattern stands for; rather too many than too few."""
    if name == "ANY":
        return _ALL
    if name == "LITERAL":
        return _cased({min(value, 128)}, fold)
    if name == "NOT_LITERAL":
        return _ALL - ({value} - _OTHER)
    negated, found = False, set[int]()
    for part, content in value:
        kind = str(part)
        if kind == "NEGATE":
            negated = True
        elif kind == "RANGE":
            low, high = content
            found |= set(range(low, min(high, 127) + 1)) | (set(_OTHER) if high > 127 else set())
        elif kind == "LITERAL":
            found.add(min(content, 128))
        else:
            found |= _category(str(content))
    if negated:
        return _ALL - (found - _OTHER)
    return _cased(found, fold)


def _category(name: str) -> set[int]:
    letter = {"DIGIT": r"\d", "SPACE": r"\s", "WORD": r"\w"}[name.rpartition("_")[2]]
    wanted = "_NOT_" not in name
    ascii_ = {n for n in range(128) if bool(re.match(letter, chr(n))) == wanted}
    return ascii_ | set(_OTHER)


def _cased(found: set[int], fold: bool) -> frozenset[int]:
    if not fold:
        return frozenset(found)
    both = {ord(c) for n in found if n < 128 for c in (chr(n).lower(), chr(n).upper())}
    # Some letters beyond ASCII are cases of letters within it.
    return frozenset(found | both) | _OTHER
