"""Adapters for others: shareable safetensors, or merged into a checkpoint that stock tools load."""

from __future__ import annotations

from .run import ExportResult, export_adapter

__all__ = ["ExportResult", "export_adapter"]
