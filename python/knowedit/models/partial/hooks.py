"""Hooks on a model's modules, and virtual edits made of them: no weight is touched.

Where the whole model runs in place of a part, hooks see and change that part's tokens only, through
a `Window`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from knowedit.models.experts import Routed, WideProjection, as_keys
from knowedit.models.probing import first_of

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
def seen_through(window: Window) -> Iterator[None]:
    token = _window.set(window)
    try:
        yield
    finally:
        _window.reset(token)


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
    weight is touched. Of a layer's routed experts and its shared one `V` has the latter's rows
    last.

    Instead of a layer's number, the name of any linear module below `hf`; each row of the batch can
    have its own pair, `[B, out, r]` and `[B, in, r]`.
    """

    def hook(pair: tuple[Tensor, Tensor]) -> Hook:
        def add(inputs: Any, output: Tensor) -> Tensor:
            left, right = (factor.to(output) for factor in pair)
            return output + (as_keys(inputs) @ right) @ left.mT

        return add

    apart = (place for at, pair in factors.items() for place in _places(model, at, pair))
    return hooked({module: hook(pair) for module, pair in apart})


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


def _places(
    model: EditableModel, at: str | int, pair: tuple[Tensor, Tensor]
) -> Iterator[tuple[nn.Module, tuple[Tensor, Tensor]]]:
    """The modules that a change of a layer, or of a module by name, is of, each with its part."""
    beside = None if isinstance(at, str) else model.layout.beside(at)
    if beside is None:
        yield _module(model, at), pair
        return
    left, right = pair
    own = right.shape[-2] - beside.width
    yield _module(model, at), (left, right[..., :own, :])
    yield model.hf.get_submodule(beside.projection), (left, right[..., own:, :])


def _module(model: EditableModel, at: str | int) -> nn.Module:
    """A module by name, or the projection of a layer."""
    return model.hf.get_submodule(at) if isinstance(at, str) else model.projection(at)
