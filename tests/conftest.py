"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before any import reads it: no test needs the hub, and where none is reached each file that is
# asked for waits through twenty seconds of retries. A test of a machine that is online unsets it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keeps each test out of the user's cache, and out of the other tests'."""
    folder = tmp_path_factory.mktemp("moelora_cache")
    monkeypatch.setenv("MOELORA_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def real_dir() -> str:
    """The folder with real rows, for tests marked `data`."""
    folder = os.environ.get("MOELORA_DATA_DIR")
    if not folder:
        pytest.skip("MOELORA_DATA_DIR names no folder with real rows")
    return folder
