"""Methods: facts go in, an `Edit` comes out. `listing` says which there are, `registry` makes them.

The classes are imported when they are first asked for: `from knowedit.methods import MEMIT`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from knowedit.io.lazy import lazy

if TYPE_CHECKING:
    from knowedit.methods.base import Method as Method
    from knowedit.methods.base import statistics_for as statistics_for
    from knowedit.methods.gradient.named.ft import FineTuning as FineTuning
    from knowedit.methods.gradient.named.ft_l import FTL as FTL
    from knowedit.methods.gradient.named.kl_ft import KLFineTuning as KLFineTuning
    from knowedit.methods.gradient.named.kl_lora import KLLoRA as KLLoRA
    from knowedit.methods.gradient.named.lora import LoRA as LoRA
    from knowedit.methods.gradient.named.one_step import OneStep as OneStep
    from knowedit.methods.gradient.named.regularised_lora import RegularisedLoRA as RegularisedLoRA
    from knowedit.methods.gradient.named.ultraedit import UltraEdit as UltraEdit
    from knowedit.methods.learned.named.mend import MEND as MEND
    from knowedit.methods.learned.named.serac import SERAC as SERAC
    from knowedit.methods.locate.named.alphaedit import AlphaEdit as AlphaEdit
    from knowedit.methods.locate.named.betaedit import BetaEdit as BetaEdit
    from knowedit.methods.locate.named.crispedit import CrispEdit as CrispEdit
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

__getattr__, __dir__, __all__ = lazy(__name__, __file__, globals())
