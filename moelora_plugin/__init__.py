"""Mixtures of LoRA experts for PEFT, with Riemannian and gate-rescaled optimizers.

`import moelora_plugin` is light: it installs the post-import hooks of `autoload` (PEFT learns the
type MOELORA when it is imported) and serves the public names on first use (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import autoload

if TYPE_CHECKING:
    from .analysis import routing_statistics
    from .call import routing_ids
    from .checkpoint import load_adapter, save_adapter
    from .config import MoeLoraConfig
    from .export import export_adapter
    from .families import (
        register,
        register_allocation,
        register_expert,
        register_features,
        register_initialization,
        register_loss,
        register_preset,
        register_router,
        register_router_input,
        register_router_modifier,
        register_router_score,
        register_scale,
        register_site,
    )
    from .model import MoeLoraModel
    from .optim import (
        RiemannianAdamW,
        RiemannianSGD,
        build_optimizer,
        precondition_in_backward,
    )
    from .presets import PRESETS

__version__ = "0.1.0"

_HOME_OF = {
    "MoeLoraConfig": "config",
    "MoeLoraModel": "model",
    "PRESETS": "presets",
    "RiemannianAdamW": "optim",
    "RiemannianSGD": "optim",
    "build_optimizer": "optim",
    "export_adapter": "export",
    "load_adapter": "checkpoint",
    "precondition_in_backward": "optim",
    "register": "families",
    "register_allocation": "families",
    "register_expert": "families",
    "register_features": "families",
    "register_initialization": "families",
    "register_loss": "families",
    "register_preset": "families",
    "register_router": "families",
    "register_router_input": "families",
    "register_router_modifier": "families",
    "register_router_score": "families",
    "register_scale": "families",
    "register_site": "families",
    "routing_ids": "call",
    "routing_statistics": "analysis",
    "save_adapter": "checkpoint",
}

__all__ = [
    "PRESETS",
    "MoeLoraConfig",
    "MoeLoraModel",
    "RiemannianAdamW",
    "RiemannianSGD",
    "build_optimizer",
    "export_adapter",
    "load_adapter",
    "precondition_in_backward",
    "register",
    "register_allocation",
    "register_expert",
    "register_features",
    "register_initialization",
    "register_loss",
    "register_preset",
    "register_router",
    "register_router_input",
    "register_router_modifier",
    "register_router_score",
    "register_scale",
    "register_site",
    "routing_ids",
    "routing_statistics",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOME_OF[name] not in ("families", "presets"):
        from .registration import register

        autoload.activate()
        register()
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


autoload.install()
