"""A model from a layer on, and whether that gives what the whole model gives."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from knowedit.errors import ModelError
from knowedit.models.packed import beginnings
from knowedit.models.partial.arguments import of_rows, sliced
from knowedit.models.partial.calls import Capture, capture
from knowedit.models.partial.comparing import check_rows, off, tried
from knowedit.models.partial.hooks import Window
from knowedit.models.partial.replay import Replay
from knowedit.models.partial.whole import Whole
from knowedit.models.probing import direction
from knowedit.models.tokens import Row

if TYPE_CHECKING:
    from knowedit.models.editable import EditableModel


class PartialModel:
    """The layers from `from_layer` on and the final norm, on the tokens from each row's
    `from_token` on: what stands in front keeps its clean keys and values. Differentiable; the
    weights may be edited virtually.

    Args:
        model: the model; its weights must not change while this is used.
        rows: tokenised texts.
        from_layer: its input is replaced; 1 or more, as what is below is computed once.
        from_token: by row; None: from each row's `subject` on.
        alike: rows that begin alike have the same states there, so these are computed once; not so
            where hooks or virtual edits differ from row to row.

    Attributes:
        states: `[B, Q, hidden]` clean inputs of `from_layer`, token 0 being `from_token`.

    Raises:
        ModelError: there is no such layer.
    """

    model: EditableModel
    from_layer: int
    states: Tensor
    _way: Replay | Whole

    def __init__(
        self,
        model: EditableModel,
        rows: Sequence[Row],
        from_layer: int,
        from_token: Sequence[int] | None = None,
        *,
        alike: bool = False,
        _replay: bool | None = None,
    ) -> None:
        self.model, self.from_layer = model, from_layer
        ids, mask = model.pad([r.ids for r in rows])
        starts = [r.subject for r in rows] if from_token is None else list(from_token)
        start = torch.tensor(starts, device=ids.device)
        before_start = torch.arange(ids.shape[1], device=ids.device) < start[:, None]
        found = capture(
            model,
            ids,
            from_layer,
            replay=_replay,
            live=(mask.bool(), mask.bool() & before_start),
            alike=beginnings([r.ids for r in rows], ids.shape[1]) if alike else None,
        )
        queries, prefix = int((mask.sum(1) - start).max()), int(start.max())
        # [B, Q] global positions, may pass the end
        at = start[:, None] + torch.arange(queries, device=ids.device)
        inside = at < mask.sum(1)[:, None]
        at = at.clamp(max=ids.shape[1] - 1)
        window = Window(at, inside)
        self.states = window.take(found.states)
        if found.cache is None:
            self._way = Whole(model, tuple(found.calls), found.text, window)
            return
        before = torch.arange(prefix, device=ids.device)
        columns = torch.cat([before.expand(len(rows), -1), at], 1)  # key positions, global
        live = torch.cat([before < start[:, None], inside], 1)
        causal = (columns[:, None, :] <= at[:, :, None]) & live[:, None, :]
        # a padded query sees itself: with nothing to see its softmax is NaN, and NaN poisons the
        # gradient
        itself = (
            torch.arange(columns.shape[1], device=ids.device)
            == prefix + torch.arange(queries, device=ids.device)[:, None]
        )
        idle = ~inside[:, :, None] & itself
        length = ids.shape[1]
        calls = {
            index: call.changed(lambda given: sliced(given, at, columns, causal, idle, length))
            for index, call in found.calls.items()
        }
        before_it = found.cache.changed(lambda tensor: tensor[:, :, :prefix])
        self._way = Replay(model, calls, before_it, inside)

    @classmethod
    def behind(cls, found: Capture, from_token: int) -> PartialModel:
        """Of a capture of texts of one length, on the tokens from `from_token` on; for any number
        of copies of its rows (`layer`).
        """
        count, length = found.states.shape[-3:-1]
        columns = torch.arange(length, device=found.states.device)[None]
        at = columns[:, from_token:]
        states = found.states[..., from_token:, :]
        if found.cache is None:
            window = Window(at.expand(count, -1), torch.ones_like(at, dtype=torch.bool))
            window = replace(window, inside=window.inside.expand(count, -1))
            way = Whole(found.model, tuple(found.calls), found.text, window)
            return cls._of(found.model, found.from_layer, states, way)
        causal = columns[:, None] <= at[..., None]
        idle = torch.zeros_like(causal)
        calls = {
            index: call.changed(  # the same for all rows
                lambda given: sliced(
                    of_rows(given, count, slice(1)), at, columns, causal, idle, length
                )
            )
            for index, call in found.calls.items()
        }
        prefix = found.cache.changed(lambda tensor: tensor[:, :, :from_token])
        replayed = Replay(found.model, calls, prefix)
        return cls._of(found.model, found.from_layer, states, replayed)

    @classmethod
    def for_texts(cls, model: EditableModel, from_layer: int, longest: int) -> PartialModel:
        """For whole texts of at most `longest` tokens that are batched anew at every step: `run`
        takes `[B, T, hidden]`. `from_layer` is 1 or more.

        Raises:
            ModelError: what the layers do depends on the tokens too, not only on their states.
        """
        model.check_layers([from_layer])
        for replay in (True, False)[not model.replays :]:
            part = cls._for_texts(model, from_layer, longest, replay)
            # three passes, and editing code asks at every edit
            if tried(model, (replay, from_layer), functools.partial(_fits_texts, part)):
                return part
        raise ModelError(
            f"{model.name}: its layers depend on the tokens themselves, not only on the hidden "
            f"states below layer {from_layer}; a learned editor cannot be trained on it"
        )

    @classmethod
    def _for_texts(
        cls, model: EditableModel, from_layer: int, longest: int, replay: bool
    ) -> PartialModel:
        ids = torch.zeros(1, longest, dtype=torch.long, device=model.device)
        found = capture(model, ids, from_layer, replay=replay)
        way = (
            Whole(model, tuple(found.calls), None, None)
            if found.cache is None
            else Replay(model, found.calls, None)
        )
        return cls._of(model, from_layer, found.states[:, :0], way)

    @classmethod
    def _of(
        cls, model: EditableModel, from_layer: int, states: Tensor, way: Replay | Whole
    ) -> PartialModel:
        part = object.__new__(cls)
        part.model, part.from_layer, part.states, part._way = model, from_layer, states, way
        return part

    def select(self, rows: Tensor) -> PartialModel:
        """The same for some of its rows (`rows`: indices)."""
        way = self._way.select(self.states.shape[-3], rows)
        return self._of(self.model, self.from_layer, self.states[..., rows, :, :], way)

    def run(self, states: Tensor | None = None, *, unseen: bool = False) -> Tensor:
        """Final hidden states (after the last norm) `[B, Q, hidden]` for inputs of `from_layer`;
        None: the clean ones.

        Args:
            unseen: nothing looks into the layers or changes them, so that they may run all texts
                in one row, which is faster.
        """
        states = self.states if states is None else states
        with self.model.evaluating():
            if unseen and isinstance(self._way, Replay) and runs_flat(self.model):
                flat = self._way.flat
                if flat is not None:
                    return flat.run(states)
            return self._way.run(states)

    def layer(self, index: int, states: Tensor) -> Tensor:
        """Output of one layer for inputs `[copies * B, Q, hidden]`, copy by copy."""
        with self.model.evaluating():
            return self._way.layer(index, states)


def runs_flat(model: EditableModel) -> bool:
    """Whether texts in one row have the states of texts one below the other, where nothing looks
    into the layers (`run(unseen=True)`): tried once.
    """
    return tried(model, "flat", lambda: flat_error(model) <= model.rounding)


@torch.no_grad()
def flat_error(model: EditableModel) -> float:
    """How far states of two short texts in one row are from those of layers that run both texts
    one below the other, relatively; infinite when they cannot be run.
    """
    rows, starts = check_rows(model)
    try:
        part = PartialModel(model, rows, 1, starts)
        flat = part._way.flat if isinstance(part._way, Replay) else None
        if flat is None:
            return float("inf")
        moved = part.states.clone()
        moved[..., 0, :] += moved[..., 0, :].std() * direction(moved)
        with model.evaluating():
            mine = flat.run(moved)
        return off(mine.flatten(0, 1)[flat.order.at], part.run(moved).flatten(0, 1)[flat.order.at])
    except Exception:  # whatever a model's own code raises when it is called like this
        return float("inf")


@torch.no_grad()
def replays(model: EditableModel) -> float:
    """How far layers run one by one are from the whole model, relatively, on two short rows with a
    changed state; infinite when they cannot be run. 0 where there is nothing above layer 0.
    """
    if len(model.layers) < 2:
        return 0.0
    rows, starts = check_rows(model)
    try:
        one = PartialModel(model, rows, 1, starts, _replay=True)
        whole = PartialModel(model, rows, 1, starts, _replay=False)
        moved = whole.states.clone()
        moved[..., 0, :] += moved[..., 0, :].std() * direction(moved)
        mine, theirs = one.run(moved), whole.run(moved)
    except Exception:  # whatever a model's own code raises when it is called like this
        return float("inf")
    return max(
        off(mine[i, : len(row.ids) - start], theirs[i, : len(row.ids) - start])
        for i, (row, start) in enumerate(zip(rows, starts, strict=True))
    )


@torch.no_grad()
def _fits_texts(part: PartialModel) -> bool:
    """Whether a part for whole texts gives what the whole model gives of a short one."""
    model, ids = part.model, part.model.pad([check_rows(part.model)[0][1].ids])[0]
    wanted = capture(model, ids, part.from_layer, replay=False).states
    try:
        found = off(part.run(wanted), model.final_states(ids))
    except Exception:  # whatever a model's own code raises when it is called like this
        return False
    return found < model.rounding
