"""Other people's editing code, faster: `accelerate("memit")` replaces the slow functions of a host
by ones that give the same results, and can be taken back.

    from knowedit.integrations import accelerate, accelerated

    accelerate("easyedit")              # until .uninstall()
    with accelerated("memit"):          # or for a block
        apply_memit_to_model(...)

Nothing happens when this is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from knowedit.io.lazy import attributes

if TYPE_CHECKING:
    from knowedit.integrations.acceleration import Acceleration as Acceleration
    from knowedit.integrations.acceleration import accelerate as accelerate
    from knowedit.integrations.acceleration import accelerated as accelerated
    from knowedit.integrations.acceleration import explain as explain
    from knowedit.integrations.acceleration import uninstall as uninstall

MODULES = {
    "knowedit.integrations.acceleration": (
        "Acceleration",
        "accelerate",
        "accelerated",
        "explain",
        "uninstall",
    ),
}
__all__ = sorted(name for names in MODULES.values() for name in names)


def __getattr__(name: str) -> Any:
    return attributes(__name__, MODULES, globals(), name)
