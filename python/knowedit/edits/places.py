"""Where the files of a folder hold a model's weights: by names of their own, and in pieces."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from knowedit.errors import EditError
from knowedit.io.tensors import checksum
from knowedit.models.experts import slice_name, split_name


def places(files: Iterable[Path], edited: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Where a folder's weight files hold each parameter, as the record says it: `tensor`, its name
    there, or `parts`, several one above the other. Most models' names are the model's own; others'
    are from before it was put together, and there the bits say which.

    Raises:
        EditError: a parameter is not in the files.
    """
    found: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        there: dict[str, Any] = {}
        for file in files:
            opened = stack.enter_context(safe_open(file, framework="pt"))
            there |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        for name, tensor in edited.items():
            own = {one: there[one] for one in (split_name(name)[0],) if one in there}
            if _parts(own, name, tensor) == [{"tensor": name}]:
                found[name] = {"tensor": name}
        taken = {place["tensor"] for place in found.values()}
        for name in sorted(set(edited) - set(found)):
            # of experts that are alike, the one with the same numbers in its name
            order = sorted(set(there) - taken, key=lambda n: (_numbers(n) != _numbers(name), n))
            parts = _parts({other: there[other] for other in order}, name, edited[name])
            if not parts:
                raise EditError(
                    f"transformers writes {name} together with other weights, so that its bits "
                    "could not be put back into the folder; keep the edit file, and apply it to "
                    "the loaded model, or export it as an adapter (`knowedit export`)"
                )
            found[name] = parts[0] if len(parts) == 1 else {"parts": parts}
            taken |= {part["tensor"] for part in parts}
    return found


def pieces(weight: Mapping[str, Any], tensor: Tensor) -> list[tuple[Mapping[str, Any], Tensor]]:
    """Each of the files' tensors that a weight stands in, as the record says it, with what it has
    of the bits `tensor`.
    """
    if "parts" not in weight:
        return [(weight, tensor)]
    rows = [part["rows"] for part in weight["parts"]]
    return list(zip(weight["parts"], tensor.split(rows), strict=True))


def said(weight: Mapping[str, Any], tensor: Tensor, name: str = "edited") -> dict[str, Any]:
    """What the record says of a weight, with checksums of what was written under `name`."""
    made = [{**part, name: checksum(bits)} for part, bits in pieces(weight, tensor)]
    return {**weight, "parts": made} if "parts" in weight else made[0]


def _numbers(name: str) -> list[str]:
    """The numbers in a parameter's name: of its layer, and of the expert."""
    return [part for part in re.split(r"[.\[\]]", name) if part.isdigit()]


def _parts(there: Mapping[str, Any], name: str, tensor: Tensor) -> list[dict[str, Any]]:
    """The files' tensors, of those `there` by name, whose bits are those of the parameter `name`:
    one, one expert's matrix in one, or several that make its rows. Empty: none are.
    """
    expert, shape = split_name(name)[1], tuple(tensor.shape)
    shapes = {other: tuple(part.get_shape()) for other, part in there.items()}
    for other, part in there.items():
        if shapes[other] == shape and _same(part[:], tensor):
            return [{"tensor": other}]
        inside = shapes[other][1:] == shape and expert is not None and expert < shapes[other][0]
        if expert is not None and inside and _same(part[expert], tensor):
            return [{"tensor": slice_name(other, expert)}]
    parts: list[dict[str, Any]] = []
    left = tensor
    while len(left):
        fits = (
            other
            for other, part in there.items()
            if shapes[other][1:] == shape[1:]
            and 0 < shapes[other][0] <= len(left)
            and _same(part[:1], left[:1])
            and _same(part[:], left[: shapes[other][0]])
            and all(other != one["tensor"] for one in parts)
        )
        found = next(fits, None)
        if found is None:
            return []
        parts.append({"tensor": found, "rows": shapes[found][0]})
        left = left[shapes[found][0] :]
    return parts


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bits."""
    return one.dtype == other.dtype and torch.equal(one, other)
