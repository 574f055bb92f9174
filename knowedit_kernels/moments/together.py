"""Updates of several layers' moments at once: all or none, and full blocks share a launch."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from knowedit_kernels import _modes
from knowedit_kernels._arguments import need_tensors
from knowedit_kernels._dispatch import Candidate
from knowedit_kernels.moments.call import UpdateCall
from knowedit_kernels.moments.checks import complaint, limit_of
from knowedit_kernels.moments.functional import kept_rows

if TYPE_CHECKING:
    from knowedit_kernels.moments.state import SecondMoment

# The living moments by number, for `moment_update_`: an op takes numbers and tensors only.
_LIVE: weakref.WeakValueDictionary[int, SecondMoment] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def number_of(moment: SecondMoment) -> int:
    """A number by which the op finds this moment as long as it lives."""
    number = next(_NUMBERS)
    _LIVE[number] = moment
    return number


def update_together(
    moments: Sequence[SecondMoment], keys: Sequence[torch.Tensor], mask: torch.Tensor | None = None
) -> None:
    """Updates several layers' (distinct) moments with keys of the same tokens; full blocks share
    one kernel launch.

    Raises as `SecondMoment.update`; then no layer has counted anything.
    """
    if len(set(map(id, moments))) != len(moments):
        raise ValueError("the same SecondMoment occurs twice; give every layer its own")
    if len(moments) != len(keys):
        raise ValueError(f"{len(moments)} moments, but keys of {len(keys)} layers")
    for given in keys:  # the operator would only say what it is called
        need_tensors(keys=given)
    if mask is not None:
        need_tensors(mask=mask)
    torch.ops.knowedit.moment_update_(
        [moment._turn for moment in moments],
        list(keys),
        mask,
        [moment._number for moment in moments],
    )


@_modes.lasting
def _update_(call: UpdateCall) -> None:
    """``moment_update_`` of `_ops`: reads the keys, and changes the state only if all are fine."""
    moments, keys, mask = [_LIVE[number] for number in call.moments], call.keys, call.mask
    rows = {device: kept_rows(mask, device) for device in dict.fromkeys(key.device for key in keys)}
    staged = [moment._stage(key, mask, rows[key.device]) for moment, key in zip(moments, keys)]
    traces = torch.stack([sums[0].to(staged[0][1].device) for _, sums in staged]).tolist()
    for moment, key, trace in zip(moments, keys, traces):
        limit = limit_of(moment.precision)
        if not trace < limit:
            raise ValueError(complaint(key.detach(), mask, limit))
    try:
        full = [(moment, moment._commit(*batch)) for moment, batch in zip(moments, staged)]
        for turn in range(max(len(blocks) for _, blocks in full)):
            ready = [(moment, blocks[turn]) for moment, blocks in full if turn < len(blocks)]
            for precision in sorted({moment.precision for moment, _ in ready}):
                same = [(moment, block) for moment, block in ready if moment.precision == precision]
                launch([moment for moment, _ in same], [block for _, block in same])
    except BaseException:
        for moment in moments:
            moment._whole = False
        raise


def launch(moments: Sequence[SecondMoment], blocks: Sequence[torch.Tensor]) -> None:
    """Adds a block of rows to each moment, all of one precision."""
    try:
        torch.ops.knowedit.second_moment_(
            [moment._lower for moment in moments], list(blocks), moments[0].precision
        )
    except BaseException:
        for moment in moments:
            moment._whole = False
        raise


UPDATE = Candidate("torch", _update_)
