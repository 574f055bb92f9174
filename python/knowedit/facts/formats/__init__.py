"""Public formats of facts, one file each.

To add one, add a file: every module of this folder is imported here, by name, and declares itself
with `fact_format`. A record's format is told by its fields, never by the name of its file.
"""

from importlib import import_module
from pkgutil import iter_modules

from knowedit.facts.formats.registry import FORMATS as FORMATS
from knowedit.facts.formats.registry import FactFormat as FactFormat
from knowedit.facts.formats.registry import NamedSet as NamedSet
from knowedit.facts.formats.registry import fact_format as fact_format
from knowedit.facts.formats.registry import named_sets as named_sets
from knowedit.facts.formats.registry import recognise as recognise

for _name in sorted(module.name for module in iter_modules(__path__)):
    import_module(f"{__name__}.{_name}")
