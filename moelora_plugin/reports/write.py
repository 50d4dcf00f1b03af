"""From the files of runs to a page and to Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError
from ..files import check_out_file, write_text
from .compare import read_runs
from .html import render_page
from .markdown import score_table
from .scoreboard import scoreboard
from .written import holds_page, holds_scores


def write_reports(
    arguments: Sequence[str],
    page: Path,
    markdown: Path | None = None,
    *,
    documents: int,
    overwrite: bool = False,
) -> list[Path]:
    """Read runs, and write the page and, where it is asked for, the Markdown.

    Args:
        arguments: the runs, as `read_runs` takes them.
        page: the HTML file to write.
        markdown: the Markdown file to write.
        documents: how many documents of each task the page may show.
        overwrite: replace what is there.

    Returns:
        The files that were written.

    Raises:
        ConfigError: a run that cannot be read, runs that were not scored on the same rows, a name
            given twice, or a file that is in the way.
    """
    place = check_out_file(page, overwrite=overwrite, is_ours=holds_page)
    if markdown is not None:
        other = check_out_file(
            markdown, overwrite=overwrite, is_ours=holds_scores, key="--markdown"
        )
        if other == place:
            raise ConfigError(f"--out and --markdown are both {page}; name two files.")
    if documents < 0:
        raise ConfigError(f"documents is {documents}, expected at least 0; change --documents.")
    named = read_runs(arguments)
    for name, runs in named.items():
        if len(runs) > 1:
            raise ConfigError(
                f"{len(runs)} runs are called {name}; give each a name of its own (NAME=RUN), or "
                "put seeds together with moelora compare."
            )
    board = scoreboard({name: runs[0] for name, runs in named.items()})
    contents = {page: render_page(board, documents)}
    if markdown is not None:
        contents[markdown] = f"{score_table(board)}\n"
    for path, content in contents.items():
        write_text(path, content)
    return list(contents)
