"""THE way to run a part of a model: from the bottom up to a module (`read`), or from a layer on
(`PartialModel`), under virtual edits and hooks.

A causal model's hidden states up to an edited layer, and every later layer's keys and values at
earlier tokens, do not depend on what is written at a later token. They are computed once, and each
step of an optimisation runs the few remaining tokens through the few remaining layers. Where layers
cannot be run like that (a recurrence keeps a state instead of keys and values, or a layer takes
more than it is known for), the whole model is run, with the same results: `replays` compares.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from knowedit.errors import ModelError
from knowedit.models.experts import Routed, WideProjection, as_keys
from knowedit.models.packed import Packed, beginnings, packed
from knowedit.models.probing import direction, first_of, rounding, states_of
from knowedit.models.tokens import Row, batches

if TYPE_CHECKING:
    from knowedit.models.editable import EditableModel

T = TypeVar("T")

#: Takes a module's first input (None: it has none by position; what the experts are given where it
#: is a `WideProjection`) and its output; what it returns takes the output's place, unless it is
#: None.
Hook = Callable[[Any, Tensor], Tensor | None]


@dataclass(frozen=True)
class Window:
    """Tokens of whole texts that stand for a part of them.

    Attributes:
        at: `[B, Q]` their places in the texts `[B, T]`.
        inside: `[B, Q]` whether a row has such a token.
    """

    at: Tensor
    inside: Tensor

    def take(self, states: Tensor) -> Tensor:
        """`[.., B, Q, width]` of `[.., B, T, width]`, or of `[B * T, width]`."""
        states = self._by_text(states)
        at = self.at[..., None].expand(*states.shape[:-2], -1, states.shape[-1])
        return states.gather(-2, at)

    def put(self, states: Tensor, part: Tensor) -> Tensor:
        """`states` `[.., B, T, width]` with `part` `[.., B, Q, width]` in its places."""
        row, place = self.inside.nonzero(as_tuple=True)
        changed = states.clone()
        texts = self._by_text(changed)
        texts[..., row, self.at[row, place], :] = part[..., row, place, :].to(states)
        return changed

    def _by_text(self, states: Tensor) -> Tensor:
        """States of all texts in one row (OPT's MLP, experts) text by text: a view."""
        return states.view(len(self.at), -1, states.shape[-1]) if states.dim() == 2 else states

    def copies(self, count: int) -> Window:
        """The same for `count` copies of the rows, copy by copy."""
        return Window(self.at.repeat(count, 1), self.inside.repeat(count, 1))


#: Where the whole model runs in place of a part: what hooks see and change.
_window: ContextVar[Window | None] = ContextVar("window", default=None)


@contextmanager
def _seen_through(window: Window) -> Iterator[None]:
    token = _window.set(window)
    try:
        yield
    finally:
        _window.reset(token)


# -- hooks and virtual edits
# -------------------------------------------------------------------------------------------------


@contextmanager
def hooked(modules: Mapping[nn.Module, Hook]) -> Iterator[None]:
    """Pass the first input and the (first) output of each module through its hook, within the
    block. Where a part of a model is run, a hook sees that part's tokens only.
    """

    def windowed(hook: Hook, window: Window, given: Any, whole: Tensor) -> Tensor | None:
        part = window.take(whole)
        untouched = part._version
        if isinstance(given, Tensor):
            given = window.take(given)
        elif isinstance(given, Routed):
            given = given.each(window.take)
        found = hook(given, part)
        if found is None and part._version == untouched:
            return None
        return window.put(whole, part if found is None else found)

    def forward(module: nn.Module, hook: Hook) -> Callable[..., Any]:
        def changed(_module: nn.Module, inputs: Any, named: Any, output: Any) -> Any:
            first, window = first_of(output), _window.get()
            if isinstance(module, WideProjection):
                given: Any = module.given(inputs, named)
            else:
                given = inputs[0] if inputs else None
            if window is None:
                found = hook(given, first)
            else:
                found = windowed(hook, window, given, first)
            if found is None:
                return None
            if isinstance(output, list):
                return [found, *output[1:]]
            return (found, *output[1:]) if isinstance(output, tuple) else found

        return changed

    handles = [
        _own(module).register_forward_hook(forward(module, hook), with_kwargs=True)
        for module, hook in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _own(module: nn.Module) -> nn.Module:
    """The model's module that runs where this one stands."""
    return module.module if isinstance(module, WideProjection) else module


@contextmanager
def recorded(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """The outputs of those of the modules that run."""
    found: dict[nn.Module, Tensor] = {}

    def hook(module: nn.Module) -> Hook:
        return lambda _, output: found.update({module: output})

    with hooked({module: hook(module) for module in modules}):
        yield found


def virtual(
    model: EditableModel, factors: Mapping[Any, tuple[Tensor, Tensor]]
) -> AbstractContextManager[None]:
    """Run as if layer `l`'s weight had `U Vᵀ` added (`{l: (U [hidden, r], V [d_ff, r])}`); no
    weight is touched.

    Instead of a layer's number, the name of any linear module below `hf`; each row of the batch can
    have its own pair, `[B, out, r]` and `[B, in, r]`.
    """

    def hook(pair: tuple[Tensor, Tensor]) -> Hook:
        def add(inputs: Any, output: Tensor) -> Tensor:
            left, right = (factor.to(output) for factor in pair)
            return output + (as_keys(inputs) @ right) @ left.mT

        return add

    return hooked({_module(model, at): hook(pair) for at, pair in factors.items()})


@contextmanager
def probed(
    model: EditableModel, names: Sequence[str]
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Watch linear modules: after a run, `{name: (inputs [B, T, in], probe [B, T, out])}`.

    The probe is zero and is added to the module's output: a gradient with respect to it is that of
    the output. With the inputs it gives the weight's gradient as a sum of outer products over
    tokens, which is never formed.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Hook:
        def add(inputs: Tensor, output: Tensor) -> Tensor:
            probe = torch.zeros_like(output, requires_grad=True)
            seen[name] = (inputs.detach(), probe)
            return output + probe

        return add

    with hooked({model.hf.get_submodule(name): hook(name) for name in names}):
        yield seen


class _Calling(nn.Module):
    """A function of a model as a module, so that the model's weights can be exchanged for one
    call.
    """

    def __init__(self, hf: nn.Module, function: Callable[[], Any]) -> None:
        super().__init__()
        self.hf, self.function = hf, function

    def forward(self) -> Any:
        return self.function()


def with_weights(
    model: EditableModel, weights: Mapping[str, Tensor], function: Callable[[], T]
) -> T:
    """What `function` returns with some parameters (by name below `hf`) exchanged for tensors;
    differentiable with respect to these.
    """
    inside = {f"hf.{name}": weight for name, weight in weights.items()}
    with model.evaluating():
        return functional_call(_Calling(model.hf, function), inside, ())


def _module(model: EditableModel, at: str | int) -> nn.Module:
    """A module by name, or the projection of a layer."""
    return model.hf.get_submodule(at) if isinstance(at, str) else model.projection(at)


# -- from the bottom up
# -------------------------------------------------------------------------------------------------


class _Stop(Exception):
    """Raised inside a forward pass once the last wanted value was read."""


@torch.no_grad()
def read(
    model: EditableModel,
    ids: Tensor,
    *,
    inputs: Mapping[str, Callable[[Any], Any]] | None = None,
    outputs: Mapping[str, Callable[[Tensor], Any]] | None = None,
    positions: Tensor | None = None,
) -> None:
    """One forward pass that ends as soon as all wanted values were read; nothing above runs.

    Args:
        ids: `[B, T]`, right-padded: causal attention never looks at the padding, so no mask is
            needed.
        inputs, outputs: by module name below `hf`, what is called with the module's first input or
            output, `[B, T, width]`; with what routed experts are given (`Routed`) where the module
            holds them. Before the last of `inputs` the pass stops without running the module
            itself.
        positions: `[B, T]`, where several texts stand behind each other in a row: each begins again
            at 0.

    Raises:
        ModelError: the pass ended without reaching a module.
    """
    wanted = {("input", name) for name in inputs or {}}
    wanted |= {("output", name) for name in outputs or {}}
    routed = model.layout.routed

    def done(kind: str, name: str) -> None:
        wanted.discard((kind, name))
        if not wanted:
            raise _Stop

    def before(
        name: str, take: Callable[[Any], Any], module: nn.Module, given: Any, named: Any
    ) -> None:
        if name in routed:
            take(WideProjection(module, routed[name]).given(given, named).reshape(*ids.shape))
        else:
            take(_by_text(given[0], ids))
        done("input", name)

    def after(
        name: str, take: Callable[[Tensor], Any], _module: nn.Module, _given: Any, output: Any
    ) -> None:
        take(_by_text(first_of(output), ids))
        done("output", name)

    handles: list[Any] = []
    try:
        for name, take in (inputs or {}).items():
            module = model.hf.get_submodule(name)
            handles.append(
                module.register_forward_pre_hook(partial(before, name, take), with_kwargs=True)
            )
        for name, take in (outputs or {}).items():
            module = model.hf.get_submodule(name)
            handles.append(module.register_forward_hook(partial(after, name, take)))
        model.final_states(ids, positions)
    except _Stop:
        return
    finally:
        for handle in handles:
            handle.remove()
    left = ", ".join(sorted(name for _, name in wanted)) or "anything that was asked for"
    raise ModelError(f"{model.name}: the forward pass ended without reaching {left}")


def _by_text(states: Tensor, ids: Tensor) -> Tensor:
    """States of the texts `ids` `[B, T]` as `[B, T, width]`: some MLPs have all tokens in one row,
    and of several streams (Gemma 3n) the first is the model's own.
    """
    if states.dim() > 3:
        return states[(0,) * (states.dim() - 3)]
    return states.reshape(*ids.shape, -1) if states.dim() == 2 else states


def read_keys(
    model: EditableModel,
    ids: Tensor,
    layers: Sequence[int],
    on_key: Callable[[int, Any], Any],
    *,
    positions: Tensor | None = None,
) -> None:
    """`on_key(layer, keys [B, T, d_ff])` for each of `layers` in one pass, which ends before the
    deepest one's projection; `Routed` in place of the keys where a layer has experts; see `read`.
    """
    model.check_layers(layers)
    names = {model.layout.projection(layer): layer for layer in sorted(set(layers))}
    read(
        model,
        ids,
        inputs={name: partial(on_key, layer) for name, layer in names.items()},
        positions=positions,
    )


def layer_outputs(
    model: EditableModel, inputs: Sequence[list[int]], layer: int, budget: int = 2048
) -> Iterator[tuple[list[int], Tensor]]:
    """Outputs of `layer`, batch by batch: which of the token lists, and their states `[B, T,
    hidden]`, right-padded.
    """
    model.check_layers([layer])
    for group in batches([len(ids) for ids in inputs], budget):
        found: list[Tensor] = []
        ids, _ = model.pad([inputs[i] for i in group])
        read(model, ids, outputs={model.layout.layer(layer): found.append})
        yield group, found[0]


# -- from a layer on
# -------------------------------------------------------------------------------------------------


class Prefix:
    """A read-only stand-in for transformers' cache: the clean prefix's keys and values in front of
    the new ones.

    Attributes:
        keys, values: by layer, `[B, heads, prefix, width]`.
    """

    is_compileable = False

    def __init__(self, keys: Mapping[int, Tensor], values: Mapping[int, Tensor]) -> None:
        self.keys, self.values = keys, values

    def update(
        self, key: Tensor, value: Tensor, layer: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys[layer], key], 2), torch.cat([self.values[layer], value], 2)

    def get_seq_length(self, layer: int = 0) -> int:
        return next(iter(self.keys.values())).shape[2]

    def changed(self, change: Callable[[Tensor], Tensor]) -> Prefix:
        """The same with every tensor passed through `change`."""
        keys, values = (
            {layer: change(tensor) for layer, tensor in part.items()}
            for part in (self.keys, self.values)
        )
        return Prefix(keys, values)


@dataclass(frozen=True)
class Given:
    """What a whole model reads.

    Attributes:
        ids: `[B, T]`.
        embeddings: `[B, T, width]` in the place of theirs; None: theirs.
    """

    ids: Tensor
    embeddings: Tensor | None = None

    def changed(self, change: Callable[[Tensor], Tensor]) -> Given:
        """The same with its tensors passed through `change`."""
        return Given(change(self.ids), None if self.embeddings is None else change(self.embeddings))

    def run(self, model: EditableModel, **more: Any) -> Any:
        """What the model without its head makes of it. The tokens are there too: some models look
        at them once more.
        """
        put = self.embeddings
        if put is None:
            return model.base(input_ids=self.ids, **more)

        def replaced(_module: nn.Module, _ids: Any, output: Tensor) -> Tensor | None:
            return put if output.shape == put.shape else None

        handle = model.hf.get_input_embeddings().register_forward_hook(replaced)
        try:
            return model.base(input_ids=self.ids, **more)
        finally:
            handle.remove()


@dataclass(frozen=True)
class Capture:
    """What one forward pass hands to the layers from `from_layer` on.

    Attributes:
        states: `[B, T, hidden]` the input of the first of them.
        text: what the whole model was given.
        calls: of each layer that ran, its other arguments; without them where the whole model is
            run.
        cache: `{layer: (keys, values)}`, `[B, heads, T, width]` each; None likewise.
    """

    model: EditableModel
    from_layer: int
    states: Tensor
    text: Given
    calls: dict[int, Call]
    cache: Prefix | None


@dataclass(frozen=True)
class Call:
    """A layer's arguments beside its hidden states.

    Attributes:
        cache: name of the one that takes the key/value cache, "" when there is none.
        arguments: the others, by name.
    """

    cache: str
    arguments: dict[str, Any]

    def changed(self, change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Call:
        """The same with its arguments passed through `change`."""
        return replace(self, arguments=change(self.arguments))


def capture(
    model: EditableModel, ids: Tensor, from_layer: int, embeddings: Tensor | None = None
) -> Capture:
    """Run the whole model once and keep what the layers from `from_layer` on are called with.

    Args:
        ids: `[B, T]`, right-padded.
        embeddings: `[B, T, hidden]`, in place of those of `ids`.

    Raises:
        ModelError: there is no such layer, or it does not run on plain text.
    """
    return _captured(model, ids, from_layer, embeddings, replay=model.replays)


@torch.no_grad()
def _captured(
    model: EditableModel,
    ids: Tensor,
    from_layer: int,
    embeddings: Tensor | None = None,
    *,
    replay: bool,
    live: tuple[Tensor, Tensor] | None = None,
    alike: Tensor | None = None,
) -> Capture:
    """As `capture`.

    Args:
        live: `[B, T]` twice: the tokens whose states are wanted at all, and those whose keys and
            values are wanted; the others' may be anything. None: all.
        alike: `[B, T]` tokens that are computed once (`beginnings`).
    """
    from transformers import DynamicCache

    blocks = list(model.layers)[from_layer:]
    if not blocks:
        raise ModelError(
            f"layer {from_layer - 1} is the last one; values are optimised at a layer below it"
        )
    text = Given(ids, embeddings)
    calls: dict[int, Call] = {}
    states: list[Tensor] = []
    # a cache made without the model's configuration keeps every token, also in sliding-window
    # layers
    cache = DynamicCache() if replay else None
    packing = packed(live[0], alike) if replay and live is not None else nullcontext()

    def note(index: int, block: nn.Module, args: Any, kwargs: Any) -> None:
        bound = inspect.signature(block.forward).bind(*args, **kwargs)
        call = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        call.pop("kwargs", None)
        state = call.pop(next(iter(call)))
        if not states:
            states.append(state)
            if isinstance(packing, Packed) and live is not None:
                packing.limit(live[1])
        named = next((name for name, value in call.items() if value is cache), "")
        call.pop(named, None)
        calls[index] = Call(named, call if replay else {})

    handles = [
        block.register_forward_pre_hook(partial(note, index), with_kwargs=True)
        for index, block in enumerate(blocks, from_layer)
    ]
    try:
        with model.evaluating(), packing:
            text.run(model, past_key_values=cache, use_cache=replay)
    finally:
        for handle in handles:
            handle.remove()
    if not states:
        raise ModelError(
            f"{model.name}: no layer from {from_layer} on runs on plain text; values are optimised "
            "at a layer below one that does"
        )
    if cache is None:
        return Capture(model, from_layer, states[0], text, calls, None)
    kept = {i: cache.layers[i] for i in calls}
    keys, values = ({i: getattr(c, part) for i, c in kept.items()} for part in ("keys", "values"))
    return Capture(model, from_layer, states[0], text, calls, Prefix(keys, values))


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
    _way: _Replay | _Whole

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
        found = _captured(
            model,
            ids,
            from_layer,
            replay=model.replays if _replay is None else _replay,
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
            self._way = _Whole(model, tuple(found.calls), found.text, window)
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
            index: call.changed(lambda given: _sliced(given, at, columns, causal, idle, length))
            for index, call in found.calls.items()
        }
        before_it = found.cache.changed(lambda tensor: tensor[:, :, :prefix])
        self._way = _Replay(model, calls, before_it, inside)

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
            way = _Whole(found.model, tuple(found.calls), found.text, window)
            return cls._of(found.model, found.from_layer, states, way)
        causal = columns[:, None] <= at[..., None]
        idle = torch.zeros_like(causal)
        calls = {
            index: call.changed(  # the same for all rows
                lambda given: _sliced(
                    _of_rows(given, count, slice(1)), at, columns, causal, idle, length
                )
            )
            for index, call in found.calls.items()
        }
        prefix = found.cache.changed(lambda tensor: tensor[:, :, :from_token])
        replayed = _Replay(found.model, calls, prefix)
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
            if _fits_texts(part):
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
        found = _captured(model, ids, from_layer, replay=replay)
        way = (
            _Whole(model, tuple(found.calls), None, None)
            if found.cache is None
            else _Replay(model, found.calls, None)
        )
        return cls._of(model, from_layer, found.states[:, :0], way)

    @classmethod
    def _of(
        cls, model: EditableModel, from_layer: int, states: Tensor, way: _Replay | _Whole
    ) -> PartialModel:
        part = object.__new__(cls)
        part.model, part.from_layer, part.states, part._way = model, from_layer, states, way
        return part

    def select(self, rows: Tensor) -> PartialModel:
        """The same for some of its rows (`rows`: indices)."""
        way = self._way.select(self.states.shape[-3], rows)
        return self._of(self.model, self.from_layer, self.states[..., rows, :, :], way)

    def run(self, states: Tensor | None = None) -> Tensor:
        """Final hidden states (after the last norm) `[B, Q, hidden]` for inputs of `from_layer`;
        None: the clean ones.
        """
        with self.model.evaluating():
            return self._way.run(self.states if states is None else states)

    def layer(self, index: int, states: Tensor) -> Tensor:
        """Output of one layer for inputs `[copies * B, Q, hidden]`, copy by copy."""
        with self.model.evaluating():
            return self._way.layer(index, states)


@dataclass(frozen=True)
class _Replay:
    """Layers called one by one, with their own arguments cut to the part's tokens.

    Attributes:
        calls: of each layer from where the part begins that runs, ascending.
        prefix: keys and values of what stands in front; None: nothing does.
        inside: `[B, Q]` which tokens are no padding; None: all.
    """

    model: EditableModel
    calls: dict[int, Call]
    prefix: Prefix | None
    inside: Tensor | None = None

    def select(self, count: int, rows: Tensor) -> _Replay:
        calls = {
            index: call.changed(lambda given: _of_rows(given, count, rows))
            for index, call in self.calls.items()
        }
        prefix = None if self.prefix is None else self.prefix.changed(lambda tensor: tensor[rows])
        inside = None if self.inside is None else self.inside[rows]
        return replace(self, calls=calls, prefix=prefix, inside=inside)

    def run(self, states: Tensor) -> Tensor:
        with nullcontext() if self.inside is None else packed(self.inside):
            for index in self.calls:
                states = self._layer(index, states, self.prefix)
        return self.model.norm(states)

    def layer(self, index: int, states: Tensor) -> Tensor:
        prefix = self.prefix
        if index not in self.calls:
            return states
        if prefix is not None:
            keys, values = prefix.keys[index], prefix.values[index]
            copies = len(states) // len(keys)
            keys, values = (tensor.repeat(copies, 1, 1, 1) for tensor in (keys, values))
            prefix = Prefix({index: keys}, {index: values})
        return self._layer(index, states, prefix)

    def _layer(self, index: int, states: Tensor, prefix: Prefix | None) -> Tensor:
        call = self.calls[index]
        given = _for_rows(call.arguments, len(states))
        if prefix is None:
            given = _cut(given, states.shape[1])
        if call.cache:
            given = {**given, call.cache: prefix}
        out = self.model.layers[index](states, **given)
        return first_of(out)


@dataclass(frozen=True)
class _Whole:
    """The whole model run, with the part's states put in where the part begins, and read where it
    ends.

    Attributes:
        runs: the layers from where the part begins that run, ascending.
        text: of all rows; None: whole texts by their states alone.
        window: the part's tokens; None: all.
    """

    model: EditableModel
    runs: tuple[int, ...]
    text: Given | None
    window: Window | None

    def select(self, count: int, rows: Tensor) -> _Whole:
        text = None if self.text is None else self.text.changed(lambda tensor: tensor[rows])
        window = self.window
        if window is not None:
            window = Window(window.at[rows], window.inside[rows])
        return replace(self, text=text, window=window)

    def run(self, states: Tensor) -> Tensor:
        text, window = self._given(states)
        with _entering(self.model.layers[self.runs[0]], states, window), _seen_through(window):
            out = text.run(self.model, use_cache=False)
        return window.take(states_of(out))

    def layer(self, index: int, states: Tensor) -> Tensor:
        if index not in self.runs:
            return states
        text, window = self._given(states)
        block, found = self.model.layers[index], []

        def stop(_block: nn.Module, _args: Any, output: Any) -> None:
            found.append(window.take(first_of(output)))
            raise _Stop

        handle = block.register_forward_hook(stop)
        try:
            with _entering(block, states, window), _seen_through(window):
                text.run(self.model, use_cache=False)
        except _Stop:
            pass
        finally:
            handle.remove()
        return found[0]

    def _given(self, states: Tensor) -> tuple[Given, Window]:
        """The whole texts and the window for states `[.., copies * B, Q, hidden]`."""
        if self.window is None or self.text is None:
            shape = states.shape[-3:-1]
            at = torch.arange(shape[1], device=states.device).expand(shape)
            ids = torch.zeros(shape, dtype=torch.long, device=states.device)
            return Given(ids), Window(at, torch.ones_like(at, dtype=torch.bool))
        copies = states.shape[-3] // len(self.window.at)
        text = self.text.changed(lambda tensor: tensor.repeat(copies, *(1,) * (tensor.dim() - 1)))
        return text, self.window.copies(copies)


@contextmanager
def _entering(block: nn.Module, states: Tensor, window: Window) -> Iterator[None]:
    """Put `states` into the window of a layer's hidden states before it runs."""

    def enter(_block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if args:
            return (window.put(args[0], states), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: window.put(kwargs[name], states)}

    handle = block.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def finished(model: EditableModel, outputs: Tensor) -> Tensor:
    """Final hidden states `[B, T, hidden]` of the last layer's outputs `[.., B, T, hidden]`: the
    model's own forward pass, with these put in.
    """
    ids = torch.zeros(outputs.shape[-3:-1], dtype=torch.long, device=outputs.device)
    with model.evaluating(), hooked({model.layers[-1]: lambda _, output: outputs}):
        return states_of(model.base(input_ids=ids, use_cache=False))


# -- whether a part gives what the whole model gives
# -------------------------------------------------------------------------------------------------


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


def off(one: Tensor, other: Tensor) -> float:
    """The relative difference of two results; infinite where either is not finite."""
    found = float((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30))
    return found if found == found else float("inf")


def check_rows(model: EditableModel) -> tuple[list[Row], list[int]]:
    """Two texts of different lengths, long enough to pass a short attention window, and where in
    them parts begin.
    """
    window = min(
        (
            value
            for name, value in model.hf.config.to_dict().items()
            if "window" in name and isinstance(value, int) and 0 < value <= 512
        ),
        default=8,
    )
    lengths, starts = (window + 12, 9), [window + 5, 2]
    size = len(model.tokenizer)
    rows = [[(7 * i + 3 * n) % max(size - 8, 2) for i in range(1, n + 1)] for n in lengths]
    return [Row(ids) for ids in rows], starts


@torch.no_grad()
def _fits_texts(part: PartialModel) -> bool:
    """Whether a part for whole texts gives what the whole model gives of a short one."""
    model, ids = part.model, part.model.pad([check_rows(part.model)[0][1].ids])[0]
    wanted = _captured(model, ids, part.from_layer, replay=False).states
    try:
        found = off(part.run(wanted), model.final_states(ids))
    except Exception:  # whatever a model's own code raises when it is called like this
        return False
    return found < rounding(model.dtype)


def _of_rows(call: Mapping[str, Any], count: int, rows: Tensor | slice) -> dict[str, Any]:
    """A layer's arguments for some rows of `count`."""

    def take(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(take, value))
        return value[rows] if isinstance(value, Tensor) and value.shape[:1] == (count,) else value

    return {name: take(value) for name, value in call.items()}


#: Arguments that are cut to a part's tokens in ways of their own; only the mask has rows.
_KNOWN = ("position_ids", "position_embeddings", "attention_mask", "cache_position")


def _by_token(name: str, value: Any, rows: int, length: int) -> bool:
    """Whether an argument that is not known by name holds something of every token."""
    return name not in _KNOWN and isinstance(value, Tensor) and value.shape[:2] == (rows, length)


def _for_rows(call: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """A layer's arguments with those of one row as often as there are rows: not every model's code
    lets a row stand for all.
    """

    def expanded(name: str, value: Any) -> Any:
        one = isinstance(value, Tensor) and value.shape[:1] == (1,)
        if not one or (name in _KNOWN and name != "attention_mask"):
            return value
        return value.expand(rows, *value.shape[1:])

    return {name: expanded(name, value) for name, value in call.items()}


def _rotary(value: Any, take: Callable[[Tensor], Tensor]) -> Any:
    """Sines and cosines, or complex numbers of both, each passed through `take`."""
    return tuple(map(take, value)) if isinstance(value, tuple | list) else take(value)


def _at_tokens(value: Tensor, at: Tensor) -> Tensor:
    """Those of the tokens `at` `[B, Q]` of an argument `[B, T, ..]`."""
    places = at.reshape(*at.shape, *(1,) * (value.dim() - 2))
    return value.gather(1, places.expand(-1, -1, *value.shape[2:]))


def _cut(call: Mapping[str, Any], length: int) -> dict[str, Any]:
    """A layer's arguments for texts of `length` tokens."""
    result = dict(call)
    if "use_cache" in call:
        result["use_cache"] = False
    if (positions := call.get("position_ids")) is not None:
        result["position_ids"] = positions[:, :length]
    if (rotary := call.get("position_embeddings")) is not None:
        result["position_embeddings"] = _rotary(rotary, lambda part: part[:, :length])
    if (mask := call.get("attention_mask")) is not None:
        result["attention_mask"] = mask[:, :, :length, :length]
    if (places := call.get("cache_position")) is not None:
        result["cache_position"] = places[:length]
    return result


def _sliced(
    call: Mapping[str, Any], at: Tensor, columns: Tensor, causal: Tensor, idle: Tensor, length: int
) -> dict[str, Any]:
    """A layer's arguments for texts of `length` tokens, restricted to the queries at positions
    `at` and the keys at positions `columns`.
    """
    rows = at.shape[0]
    result = {
        name: _at_tokens(value, at) if _by_token(name, value, rows, length) else value
        for name, value in call.items()
    }
    if "use_cache" in call:
        result["use_cache"] = False
    if (positions := call.get("position_ids")) is not None:
        result["position_ids"] = positions.expand(rows, -1).gather(1, at)
    if (rotary := call.get("position_embeddings")) is not None:
        result["position_embeddings"] = _rotary(
            rotary,
            lambda r: r.expand(rows, -1, -1).gather(1, at[..., None].expand(-1, -1, r.shape[-1])),
        )
    mask, allowed = call.get("attention_mask"), causal[:, None]
    # the layer's own mask: padding, sliding window
    if isinstance(mask, Tensor) and mask.dim() == 4:
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        seen = seen.expand(rows, -1, -1, -1)
        seen = seen.gather(2, at[:, None, :, None].expand(-1, seen.shape[1], -1, seen.shape[3]))
        allowed = allowed & seen.gather(
            3, columns[:, None, None, :].expand(-1, seen.shape[1], at.shape[1], -1)
        )
    allowed = allowed | idle[:, None]
    if isinstance(mask, Tensor) and mask.is_floating_point():
        allowed = torch.zeros_like(allowed, dtype=mask.dtype).masked_fill(
            ~allowed, torch.finfo(mask.dtype).min
        )
    result["attention_mask"] = allowed
    return result
