"""One short file per method; `EDITORS` maps the names of the command line to them."""

from .alphaedit import AlphaEdit as AlphaEdit
from .editor import Editor as Editor
from .emmet import EMMET as EMMET
from .memit import MEMIT as MEMIT
from .memit_merge import MEMITMerge as MEMITMerge
from .metake import MetaKE as MetaKE
from .pmet import PMET as PMET
from .recipe import LocateThenEdit as LocateThenEdit
from .rome import ROME as ROME
from .rose import RoSE as RoSE

EDITORS: dict[str, type[LocateThenEdit]] = {
    editor.name.lower(): editor for editor in (MEMIT, ROME, EMMET, PMET, MEMITMerge, AlphaEdit, RoSE, MetaKE)
}
