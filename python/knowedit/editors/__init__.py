"""One short file per method; `EDITORS` maps the names of the command line to them."""

from .memit import MEMIT as MEMIT
from .recipe import LocateThenEdit as LocateThenEdit
from .rome import ROME as ROME

EDITORS: dict[str, type[LocateThenEdit]] = {"memit": MEMIT, "rome": ROME}
