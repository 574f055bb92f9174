"""Methods: facts go in, an `Edit` comes out. `listing` says which there are, `registry` makes them.

The classes are imported when they are first asked for: `from knowedit.methods import MEMIT`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from knowedit.io.lazy import attributes

if TYPE_CHECKING:
    from knowedit.methods.base import Method as Method
    from knowedit.methods.base import statistics_for as statistics_for
    from knowedit.methods.gradient.named.ft import FineTuning as FineTuning
    from knowedit.methods.gradient.named.ft_l import FTL as FTL
    from knowedit.methods.gradient.named.kl_ft import KLFineTuning as KLFineTuning
    from knowedit.methods.gradient.named.kl_lora import KLLoRA as KLLoRA
    from knowedit.methods.gradient.named.lora import LoRA as LoRA
    from knowedit.methods.gradient.named.regularised_lora import RegularisedLoRA as RegularisedLoRA
    from knowedit.methods.learned.named.mend import MEND as MEND
    from knowedit.methods.learned.named.serac import SERAC as SERAC
    from knowedit.methods.locate.named.alphaedit import AlphaEdit as AlphaEdit
    from knowedit.methods.locate.named.emmet import EMMET as EMMET
    from knowedit.methods.locate.named.look_ahead import LookAhead as LookAhead
    from knowedit.methods.locate.named.memit import MEMIT as MEMIT
    from knowedit.methods.locate.named.memit_merge import MEMITMerge as MEMITMerge
    from knowedit.methods.locate.named.metake import MetaKE as MetaKE
    from knowedit.methods.locate.named.pmet import PMET as PMET
    from knowedit.methods.locate.named.rome import ROME as ROME
    from knowedit.methods.locate.named.rose import RoSE as RoSE
    from knowedit.methods.locate.recipe import Recipe as Recipe
    from knowedit.methods.neurons.named.neuron_patch import NeuronPatch as NeuronPatch
    from knowedit.methods.registry import make_method as make_method
    from knowedit.methods.session import Session as Session

#: What the names above are, by module; a test holds the two together.
MODULES = {
    "knowedit.methods.base": ("Method", "statistics_for"),
    "knowedit.methods.gradient.named.ft": ("FineTuning",),
    "knowedit.methods.gradient.named.ft_l": ("FTL",),
    "knowedit.methods.gradient.named.kl_ft": ("KLFineTuning",),
    "knowedit.methods.gradient.named.kl_lora": ("KLLoRA",),
    "knowedit.methods.gradient.named.lora": ("LoRA",),
    "knowedit.methods.gradient.named.regularised_lora": ("RegularisedLoRA",),
    "knowedit.methods.learned.named.mend": ("MEND",),
    "knowedit.methods.learned.named.serac": ("SERAC",),
    "knowedit.methods.locate.named.alphaedit": ("AlphaEdit",),
    "knowedit.methods.locate.named.emmet": ("EMMET",),
    "knowedit.methods.locate.named.look_ahead": ("LookAhead",),
    "knowedit.methods.locate.named.memit": ("MEMIT",),
    "knowedit.methods.locate.named.memit_merge": ("MEMITMerge",),
    "knowedit.methods.locate.named.metake": ("MetaKE",),
    "knowedit.methods.locate.named.pmet": ("PMET",),
    "knowedit.methods.locate.named.rome": ("ROME",),
    "knowedit.methods.locate.named.rose": ("RoSE",),
    "knowedit.methods.locate.recipe": ("Recipe",),
    "knowedit.methods.neurons.named.neuron_patch": ("NeuronPatch",),
    "knowedit.methods.registry": ("make_method",),
    "knowedit.methods.session": ("Session",),
}
__all__ = sorted(name for names in MODULES.values() for name in names)


def __getattr__(name: str) -> Any:
    return attributes(__name__, MODULES, globals(), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
