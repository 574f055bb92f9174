"""Faster functions for other people's editing code: a door to `knowedit.integrations`, where they
live, as they need the pipeline. It is opened when a name is first asked for: the kernels themselves
know tensors only, and need neither knowedit nor transformers.

    from knowedit_kernels.integrations import accelerate

    accelerate("easyedit")
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["Acceleration", "accelerate", "accelerated", "explain", "uninstall"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module("knowedit.integrations"), name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{__name__}.{name} needs {error.name}: pip install 'knowedit-kernels[edit]'"
        ) from error
