"""Tables for the terminal that show every text as it is: no markup, no emoji names, no escapes."""

from __future__ import annotations

from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from .text import block, plain


def shown(text: object, style: str = "") -> Text:
    """A text as it is, of several lines too, for rich."""
    return Text(block(text), style=style)


class PlainTable(Table):
    """rich's table. A string in it is a line that is shown as it is; pass `shown` for more."""

    def add_column(self, header: Any = "", *arguments: Any, **options: Any) -> None:
        """As rich's."""
        super().add_column(_one_line(header), *arguments, **options)

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """As rich's."""
        super().add_row(*map(_one_line, cells), **options)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # rich would read both as markup; their usual styles go with the strings.
        self.title = _one_line(self.title, "table.title")
        self.caption = _one_line(self.caption, "table.caption")
        yield from super().__rich_console__(console, options)


def plain_grid(padding: tuple[int, int]) -> PlainTable:
    """A table without lines and headers."""
    grid = PlainTable.grid(padding=padding)
    assert isinstance(grid, PlainTable)  # rich makes one of the class it is asked of
    return grid


def _one_line(part: Any, style: str = "") -> Any:
    return Text(plain(part), style=style) if isinstance(part, str) else part
