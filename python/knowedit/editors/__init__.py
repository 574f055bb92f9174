"""One short file per method; `EDITORS` maps the names of the command line to them."""

from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..errors import KnowEditError, StatisticsError
from ..model import EditableModel
from ..statistics import KeyStatistics, key_statistics
from .alphaedit import AlphaEdit as AlphaEdit
from .editor import Editor as Editor
from .emmet import EMMET as EMMET
from .fine_tuning import FTL as FTL
from .fine_tuning import FineTuning as FineTuning
from .fine_tuning import KLFineTuning as KLFineTuning
from .gradient import GradientEditor as GradientEditor
from .look_ahead import LookAhead as LookAhead
from .lora import KLLoRA as KLLoRA
from .lora import LoRA as LoRA
from .lora import RegularisedLoRA as RegularisedLoRA
from .memit import MEMIT as MEMIT
from .memit_merge import MEMITMerge as MEMITMerge
from .memory_edit import MemoryEdit as MemoryEdit
from .mend import MEND as MEND
from .metake import MetaKE as MetaKE
from .neuron_patch import NeuronPatch as NeuronPatch
from .pmet import PMET as PMET
from .recipe import LocateThenEdit as LocateThenEdit
from .rome import ROME as ROME
from .rose import RoSE as RoSE
from .serac import SERAC as SERAC

LOCATE: tuple[type[Editor], ...] = (MEMIT, ROME, EMMET, PMET, MEMITMerge, AlphaEdit, RoSE, MetaKE, LookAhead)
GRADIENT: tuple[type[Editor], ...] = (FineTuning, FTL, LoRA, RegularisedLoRA, KLFineTuning, KLLoRA)
LEARNED: tuple[type[Editor], ...] = (MEND, SERAC)
NEURONS: tuple[type[Editor], ...] = (NeuronPatch,)
EDITORS: dict[str, type[Editor]] = {editor.name.lower(): editor for editor in (*LOCATE, *GRADIENT, *LEARNED, *NEURONS)}


def make_editor(method: str, *, corpus: Any = None, **settings: Any) -> Editor:
    """The editor of that name with the settings that were given (None: not given).

    Args:
        corpus: ordinary text, for methods that read some themselves (NeuronPatch); None: their own choice.

    Raises:
        KnowEditError: an unknown method, a setting that it does not have, or one that it cannot be.
    """
    if method not in EDITORS:
        raise KnowEditError(f"unknown method {method!r}; known: {', '.join(EDITORS)}")
    editor, given = EDITORS[method], {name: value for name, value in settings.items() if value is not None}
    known = set(getattr(editor, "__dataclass_fields__", {}))
    given |= {"corpus": corpus} if corpus is not None and "corpus" in known else {}
    unknown = sorted(set(given) - known)
    if unknown:
        raise KnowEditError(f"{method} has no setting {', '.join(unknown)}")
    if isinstance(given.get("layers"), int):
        given["layers"] = (given["layers"],)
    try:
        return editor(**{name: _settings(editor, name, value) for name, value in given.items()})
    except TypeError as error:
        raise KnowEditError(f"{method}: a setting is of the wrong type ({error})") from error


def _settings(editor: type[Editor], name: str, value: Any) -> Any:
    """A dictionary as the settings class that `name` holds, everything else as it is. Raises TypeError."""
    if not isinstance(value, dict):
        return value
    hint = get_type_hints(editor)[name]
    kinds = [kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)]
    if not kinds:
        raise TypeError(f"{name} takes no dictionary")
    return kinds[0](**value)  # type: ignore[operator]


def statistics_for(
    editors: Iterable[Editor], model: EditableModel, corpus: Any, tokens: int | None, where: Path | None = None
) -> KeyStatistics | None:
    """The key statistics that the editors need together, as `layer_statistics`; None where none does.

    Raises:
        StatisticsError: some were named (`where`) and none is needed; or as `layer_statistics`.
    """
    layers = sorted({layer for editor in editors for layer in editor.statistics_layers(model)})
    if where is not None and not layers:
        raise StatisticsError(f"no method here reads statistics; leave {where} out")
    return layer_statistics(layers, model, corpus, tokens, where) if layers else None


def layer_statistics(
    layers: Sequence[int], model: EditableModel, corpus: Any, tokens: int | None, where: Path | None = None
) -> KeyStatistics:
    """The key statistics of `layers`.

    Args:
        corpus: None: Wikipedia.
        where: a file or folder of statistics, collected or imported, to take them from instead of the corpus.

    Raises:
        StatisticsError: those at `where` are a peer's, of another model or lack a layer; or as `key_statistics`.
    """
    if where is None:
        return key_statistics(model, layers, corpus or "wikipedia", tokens)
    if where.suffix == ".npz":
        raise StatisticsError(f"{where} is a peer's file: `knowedit stats import MODEL {where} -o FOLDER`, then name FOLDER")
    found = KeyStatistics.load(where)
    found.check(model, layers)
    return found
