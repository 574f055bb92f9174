"""Names that were mistyped: what may have been meant, for the end of an error message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
