"""Names and sentences from files, made harmless where they are shown.

A name in somebody's file may hold escapes that move a terminal's cursor or write to its clipboard,
marks that turn the direction of a line, or the markup of Markdown and HTML. What is shown is always
the text itself: nothing of it is carried out.
"""

from __future__ import annotations

import re

# What replaces a character that a terminal or a browser would carry out; one for one, so that
# places in the text stay where they are.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_CARRIED_OUT = (
    *range(0x20),  # C0: escape, bell, backspace, carriage return, ...
    *range(0x7F, 0xA0),  # delete and C1, of which 0x9B begins a sequence by itself
    *(0x2028, 0x2029),  # separators of lines and paragraphs
    *range(0x202A, 0x202F),  # embeddings and overrides of the writing direction
    *range(0x2066, 0x206A),  # and its isolates
    *range(0xFFF9, 0xFFFC),  # interlinear notes
    *range(0xD800, 0xE000),  # halves of surrogate pairs, which no encoding can write
    *range(0xE0000, 0xE0080),  # tags, which no font shows
)
_BLOCK = {code: REPLACEMENT for code in _CARRIED_OUT if chr(code) not in "\n\t"}
_PLAIN = dict.fromkeys(_CARRIED_OUT, REPLACEMENT) | dict.fromkeys(map(ord, "\n\r\t"), " ")

# ASCII marks that mean something to Markdown, wherever they stand. Letters, digits and what is
# common in names and numbers (. - + = / : , ; % space) stay, and so does an underscore in a word.
_MARKS = re.compile(r"[\\`*\[\]{}<>|#~!&^$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_HTML = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
# A path of the longest that people have; a message that a terminal shows at once.
_WORD, _MESSAGE = 500, 3000
_LONG_WORD = re.compile(rf"\S{{{_WORD + 1},}}")
_LINKS = re.compile(r":(?=//)|(?<=[Ww][Ww][Ww])\.|@")


def plain(value: object) -> str:
    """A text of one line, for tables and messages: a line end is a space."""
    return str(value).translate(_PLAIN)


def sentence(value: object) -> str:
    """What an error says, on one line and of a length that somebody reads.

    What stands in it of a file may be of any length: of a long word the ends stay, and of a long
    message, whose remedy is at its end.
    """
    text = _LONG_WORD.sub(lambda word: f"{word[0][:100]}...{word[0][-50:]}", plain(value))
    if len(text) <= _MESSAGE:
        return text
    return f"{text[: _MESSAGE // 2]} ... {text[-_MESSAGE // 3 :]}"


def block(value: object) -> str:
    """A text of several lines: line ends and tabs stay."""
    return str(value).translate(_BLOCK)


def markdown(value: object) -> str:
    """A text of one line, such that Markdown shows it as it is, in a cell of a table too."""
    text = _MARKS.sub(lambda mark: _HTML.get(mark[0], f"\\{mark[0]}"), plain(value))
    return _LINKS.sub(lambda mark: f"&#{ord(mark[0])};", text)


def code(value: object) -> str:
    """A text of one line as Markdown's code, for a cell of a table."""
    text = plain(value).replace("|", r"\|")
    if "`" not in text:
        return f"`{text}`" if text.strip() else "` `"
    fence = "`" * (1 + max(map(len, re.findall("`+", text))))
    return f"{fence} {text} {fence}"
