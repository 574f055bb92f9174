"""Answers in public data: a string, a list of aliases, a list of such lists, or ``{"str": ...,
"id": ...}``.
"""

from __future__ import annotations

from collections import Counter
from typing import Any


def first_answer(value: Any, forms: Counter[str]) -> str | None:
    """The first non-empty answer in `value`, or None; counts in `forms` which form `value` had."""
    form = "object" if isinstance(value, dict) else "string"
    if isinstance(value, list):
        form = "list of lists" if any(isinstance(v, list) for v in value) else "list"
    forms[form] += 1
    queue = [value]
    while queue:
        value = queue.pop(0)
        if isinstance(value, dict):
            value = value.get("str")
        if isinstance(value, list):
            queue = value + queue
        elif isinstance(value, (str, int, float)) and str(value).strip():
            return str(value)
    return None
