"""What all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keeps each test out of the user's cache, and out of the other tests'."""
    folder = tmp_path_factory.mktemp("moelora_cache")
    monkeypatch.setenv("MOELORA_CACHE", str(folder))
    return folder
