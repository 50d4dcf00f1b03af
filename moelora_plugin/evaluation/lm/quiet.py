"""Warnings and bars of other packages that say nothing to our users."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Hide the warnings of one logger."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def no_bars() -> Iterator[None]:
    """Hide the progress bars of lm-eval's requests and of transformers; ours tells more."""
    from lm_eval.api import task
    from transformers.utils import logging as transformers_logging

    bar, shown = task.tqdm, transformers_logging.is_progress_bar_enabled()
    task.tqdm = lambda rows, **_: rows
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        task.tqdm = bar
        if shown:
            transformers_logging.enable_progress_bar()
