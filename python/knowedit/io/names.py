"""Names as people type them, in any case and with any hyphens; and what a mistyped one may have
meant, for the end of an error message.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def spelled(name: str, known: Iterable[str]) -> str:
    """The one of `known` that is `name` but for case, hyphens and underscores ("NeuronPatch",
    "neuron_patch": "neuron-patch"); `name` itself where none is.
    """
    known = list(known)
    return name if name in known else {_bare(word): word for word in known}.get(_bare(name), name)


def _bare(name: str) -> str:
    return name.casefold().replace("-", "").replace("_", "")


def nearest(
    name: object, known: Iterable[str], listed_as: str = "known", also: Iterable[str] = ()
) -> str:
    """``"did you mean 'subject'?"`` when one of `known` or `also` looks like `name`, else all of
    `known` behind `listed_as`: ``"known fields: prompt, subject, target"``.
    """
    known = list(known)
    likely = {word.lower(): word for word in (*also, *known)}  # the case is no mistake to dwell on
    near = [likely[word] for word in difflib.get_close_matches(str(name).lower(), likely, n=1)]
    return f"did you mean {near[0]!r}?" if near else f"{listed_as}: {', '.join(known) or 'none'}"
