"""One short file per method; `EDITORS` maps the names of the command line to them."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from knowedit.errors import StatisticsError
from knowedit.io.config import fields_of
from knowedit.methods.base import Method as Method
from knowedit.methods.gradient.method import GradientMethod as GradientMethod
from knowedit.methods.gradient.named.ft import FineTuning as FineTuning
from knowedit.methods.gradient.named.ft_l import FTL as FTL
from knowedit.methods.gradient.named.kl_ft import KLFineTuning as KLFineTuning
from knowedit.methods.gradient.named.kl_lora import KLLoRA as KLLoRA
from knowedit.methods.gradient.named.lora import LoRA as LoRA
from knowedit.methods.gradient.named.regularised_lora import RegularisedLoRA as RegularisedLoRA
from knowedit.methods.learned.named.mend import MEND as MEND
from knowedit.methods.learned.named.serac import SERAC as SERAC
from knowedit.methods.learned.serac.memory import MemoryEdit as MemoryEdit
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
from knowedit.methods.registry import make_method
from knowedit.models.editable import EditableModel
from knowedit.statistics import KeyStatistics, key_statistics

LOCATE: tuple[type[Method], ...] = (
    MEMIT,
    ROME,
    EMMET,
    PMET,
    MEMITMerge,
    AlphaEdit,
    RoSE,
    MetaKE,
    LookAhead,
)
GRADIENT: tuple[type[Method], ...] = (FineTuning, FTL, LoRA, RegularisedLoRA, KLFineTuning, KLLoRA)
LEARNED: tuple[type[Method], ...] = (MEND, SERAC)
NEURONS: tuple[type[Method], ...] = (NeuronPatch,)
EDITORS: dict[str, type[Method]] = {
    editor.name.lower(): editor for editor in (*LOCATE, *GRADIENT, *LEARNED, *NEURONS)
}


def make_editor(method: str, *, corpus: Any = None, **settings: Any) -> Method:
    """The method of that name with the settings that were given (None: not given).

    Args:
        corpus: ordinary text, for methods that read some themselves (NeuronPatch); None: their own
            choice.

    Raises:
        ConfigError: an unknown method, a setting that it does not have, or one that it cannot be.
    """
    made = make_method(
        method, {name: value for name, value in settings.items() if value is not None}
    )
    takes = corpus is not None and "corpus" in fields_of(type(made))
    return made.with_settings(corpus=corpus) if takes else made


def statistics_for(
    editors: Iterable[Method],
    model: EditableModel,
    corpus: Any,
    tokens: int | None,
    where: Path | None = None,
) -> KeyStatistics | None:
    """The key statistics that the editors need together, as `layer_statistics`; None where none
    does.

    Raises:
        StatisticsError: some were named (`where`) and none is needed; or as `layer_statistics`.
    """
    layers = sorted({layer for editor in editors for layer in editor.statistics_layers(model)})
    if where is not None and not layers:
        raise StatisticsError(f"no method here reads statistics; leave {where} out")
    return layer_statistics(layers, model, corpus, tokens, where) if layers else None


def layer_statistics(
    layers: Sequence[int],
    model: EditableModel,
    corpus: Any,
    tokens: int | None,
    where: Path | None = None,
) -> KeyStatistics:
    """The key statistics of `layers`.

    Args:
        corpus: None: Wikipedia.
        where: a file or folder of statistics, collected or imported, to take them from instead of
            the corpus.

    Raises:
        StatisticsError: those at `where` are a peer's, of another model or lack a layer; or as
            `key_statistics`.
    """
    if where is None:
        return key_statistics(model, layers, corpus or "wikipedia", tokens)
    if where.suffix == ".npz":
        raise StatisticsError(
            f"{where} is a peer's file: `knowedit stats import MODEL {where} -o FOLDER`, then "
            f"name FOLDER"
        )
    found = KeyStatistics.load(where)
    found.check(model, layers)
    return found
