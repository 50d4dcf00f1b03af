"""The folder with real rows."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def data_dir() -> str:
    folder = os.environ.get("MOELORA_DATA_DIR")
    if not folder:
        pytest.skip("MOELORA_DATA_DIR names no folder with real rows")
    return folder
