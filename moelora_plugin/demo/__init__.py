"""Five minutes on any machine: train, evaluate and export an adapter on a small real model."""

from __future__ import annotations

from .run import DemoResult, run_demo

__all__ = ["DemoResult", "run_demo"]
