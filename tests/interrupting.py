"""Ctrl-C at a chosen line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection


def interrupted(
    action: Callable[[], object], files: Collection[str], stop: int | None = None
) -> int:
    """Run `action`, with a KeyboardInterrupt before line number `stop` of `files` (counted from 1,
    as they run); says how many of them ran, `stop` where it came.
    """
    count = 0

    def trace(frame, event, _argument):
        nonlocal count
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            count += 1
            if count == stop:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return count
