"""Knowledge editing for language models: a fact goes in, a small reversible weight update comes out, and we can prove
what it changed."""

from .edit import Edit as Edit
from .editors import EMMET as EMMET
from .editors import FTL as FTL
from .editors import MEMIT as MEMIT
from .editors import MEND as MEND
from .editors import PMET as PMET
from .editors import ROME as ROME
from .editors import SERAC as SERAC
from .editors import AlphaEdit as AlphaEdit
from .editors import FineTuning as FineTuning
from .editors import KLFineTuning as KLFineTuning
from .editors import KLLoRA as KLLoRA
from .editors import LookAhead as LookAhead
from .editors import LoRA as LoRA
from .editors import MEMITMerge as MEMITMerge
from .editors import MetaKE as MetaKE
from .editors import NeuronPatch as NeuronPatch
from .editors import RegularisedLoRA as RegularisedLoRA
from .editors import RoSE as RoSE
from .errors import EditError as EditError
from .errors import KnowEditError as KnowEditError
from .errors import ModelError as ModelError
from .errors import StatisticsError as StatisticsError
from .evaluation import evaluate as evaluate
from .facts import Fact as Fact
from .facts import FactError as FactError
from .facts import Probe as Probe
from .facts import read_facts as read_facts
from .history import History as History
from .model import EditableModel as EditableModel
from .model import load_model as load_model
from .sequential import Session as Session
from .statistics import KeyStatistics as KeyStatistics
from .statistics import key_statistics as key_statistics
from .targets import ValueSettings as ValueSettings

__version__ = "0.1.0"
