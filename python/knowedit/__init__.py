"""Knowledge editing for language models: a fact goes in, a small reversible weight update comes
out, and we can prove what it changed.

Importing the package imports no torch; each name below is imported when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from knowedit.io.lazy import lazy

if TYPE_CHECKING:
    from knowedit.edits.edit import Edit as Edit
    from knowedit.edits.history import History as History
    from knowedit.edits.limits import Limits as Limits
    from knowedit.errors import ConfigError as ConfigError
    from knowedit.errors import CorpusError as CorpusError
    from knowedit.errors import EditError as EditError
    from knowedit.errors import KnowEditError as KnowEditError
    from knowedit.errors import ModelError as ModelError
    from knowedit.errors import RuinousEditError as RuinousEditError
    from knowedit.errors import StatisticsError as StatisticsError
    from knowedit.evaluation.evaluation import evaluate as evaluate
    from knowedit.evaluation.measures.drift import drift as drift
    from knowedit.facts.fact import Fact as Fact
    from knowedit.facts.fact import FactError as FactError
    from knowedit.facts.fact import Probe as Probe
    from knowedit.facts.records import read_facts as read_facts
    from knowedit.facts.records import write_facts as write_facts
    from knowedit.methods import EMMET as EMMET
    from knowedit.methods import FTL as FTL
    from knowedit.methods import MEMIT as MEMIT
    from knowedit.methods import MEND as MEND
    from knowedit.methods import PMET as PMET
    from knowedit.methods import ROME as ROME
    from knowedit.methods import SERAC as SERAC
    from knowedit.methods import AlphaEdit as AlphaEdit
    from knowedit.methods import FineTuning as FineTuning
    from knowedit.methods import KLFineTuning as KLFineTuning
    from knowedit.methods import KLLoRA as KLLoRA
    from knowedit.methods import LookAhead as LookAhead
    from knowedit.methods import LoRA as LoRA
    from knowedit.methods import MEMITMerge as MEMITMerge
    from knowedit.methods import MetaKE as MetaKE
    from knowedit.methods import Method as Method
    from knowedit.methods import NeuronPatch as NeuronPatch
    from knowedit.methods import Recipe as Recipe
    from knowedit.methods import RegularisedLoRA as RegularisedLoRA
    from knowedit.methods import RoSE as RoSE
    from knowedit.methods import Session as Session
    from knowedit.methods import make_method as make_method
    from knowedit.methods.locate.metrics import Covariance as Covariance
    from knowedit.methods.locate.metrics import NullSpace as NullSpace
    from knowedit.methods.locate.targets import HiddenState as HiddenState
    from knowedit.models.editable import EditableModel as EditableModel
    from knowedit.models.load import load_model as load_model
    from knowedit.statistics.keys import KeyStatistics as KeyStatistics
    from knowedit.statistics.keys import key_statistics as key_statistics
    from knowedit.statistics.moments import second_moments as second_moments

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy(__name__, __file__, globals())
__all__ = sorted(["__version__", *__all__])
