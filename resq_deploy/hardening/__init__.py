"""RESQ stages I and II: training that makes a network bear attacks and bit flips."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resq_deploy.hardening.pipeline import harden_model
    from resq_deploy.hardening.recipe import Attack, Fault, Phase, Recipe

__all__ = ["Attack", "Fault", "Phase", "Recipe", "harden_model"]

_HOME = {"harden_model": "pipeline"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME.get(name, 'recipe')}"), name)
