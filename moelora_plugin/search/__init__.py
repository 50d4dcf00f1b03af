"""Searches for an allocation: how many experts, of which rank, each target module should get."""

from __future__ import annotations

from .guilomo import GuiLoMoResult, search_guilomo

__all__ = ["GuiLoMoResult", "search_guilomo"]
