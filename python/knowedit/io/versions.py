"""Which software ran: for the record of what it made."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = ("knowedit-kernels", "torch", "transformers", "numpy", "safetensors")


def software_versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions by distribution name, "not installed" where it is not, and of python."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
