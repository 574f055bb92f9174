"""Other people's editing code, faster: `accelerate("memit")` replaces the slow functions of a host
by ones that give the same results, and can be taken back.

    from knowedit.integrations import accelerate, accelerated

    accelerate("easyedit")              # until .uninstall()
    with accelerated("memit"):          # or for a block
        apply_memit_to_model(...)

Nothing happens when this is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from knowedit.io.lazy import lazy

if TYPE_CHECKING:
    from knowedit.integrations.acceleration import Acceleration as Acceleration
    from knowedit.integrations.acceleration import accelerate as accelerate
    from knowedit.integrations.acceleration import accelerated as accelerated
    from knowedit.integrations.acceleration import explain as explain
    from knowedit.integrations.acceleration import uninstall as uninstall

__getattr__, __dir__, __all__ = lazy(__name__, __file__, globals())
