"""Normal equations: covariances and projectors that remember what they are made of (`matrices`), in
the host's own lines.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType
from typing import Any
from weakref import ref

from torch import Tensor

from knowedit.integrations.discovery import Signature
from knowedit.integrations.hosts import Host
from knowedit.integrations.replacements.base import Replacement
from knowedit.integrations.replacements.matrices import Inverse, KeyLog, Projectors, Symmetric
from knowedit_kernels.lowrank.fingerprint import fingerprint

_COVARIANCE = ("model", "tok", "layer_name", "mom2_dataset", "mom2_n_samples", "mom2_dtype")


def _make_get_cov(original: FunctionType, host: Host) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def get_cov(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        inverted = bound.arguments.pop("inv", False)
        found = Symmetric(original(**bound.arguments))
        return Inverse(found) if inverted else found

    return get_cov


GET_COV = Replacement(
    "is factored once; the solve costs what its keys cost",
    Signature("get_cov", _COVARIANCE, ("inv", "force_recompute", "hparams")),
    _make_get_cov,
)


def _make_get_inv_cov(original: FunctionType, host: Host) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def get_inv_cov(*args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(*args, **kwargs).arguments)
        model, tok, layer_name, dataset, size, precision = (given.pop(n) for n in _COVARIANCE)
        names = original.__globals__
        # not its id, which another model may have once this one is gone
        known, key = names["inv_mom2_cache"], (ref(model), layer_name)
        if key not in known:
            for gone in [one for one in known if isinstance(one[0], ref) and one[0]() is None]:
                del known[gone]
            own = "stats_dir" in original.__code__.co_names  # of the hparams, or a global folder
            folder = given["hparams"].stats_dir if own else names["STATS_DIR"]
            stat = names["layer_stats"](
                model,
                tok,
                layer_name,
                folder,
                dataset,
                to_collect=["mom2"],
                sample_size=size,
                precision=precision,
                **given,
            )
            device = next(model.parameters()).device
            known[key] = Inverse(Symmetric(stat.mom2.moment().to(device))).float()
        return known[key]

    return get_inv_cov


GET_INV_COV = Replacement(
    "is factored, and never inverted",
    Signature("get_inv_cov", _COVARIANCE, ("hparams",)),
    _make_get_inv_cov,
    lambda function: (
        None
        if {"inv_mom2_cache", "layer_stats"} <= function.__globals__.keys()
        else "its module has no inv_mom2_cache or layer_stats"
    ),
)


# -- AlphaEdit

_LOG: ContextVar[KeyLog | None] = ContextVar("log", default=None)
#: One log for each host's module, as its cache goes from call to call.
_LOGS: dict[str, KeyLog] = {}


def _make_compute_ks(original: FunctionType, host: Host) -> Callable[..., Any]:
    def compute_ks(
        model: Any, tok: Any, requests: Any, hparams: Any, layer: int, context_templates: Any
    ) -> Any:
        keys = original(model, tok, requests, hparams, layer, context_templates)
        log = _LOG.get()
        if log is not None:
            log.record(layer, keys)
        return keys

    return compute_ks


COMPUTE_KS = Replacement(
    "runs as it is; its keys are noted, so that sums of their products are recognised",
    Signature("compute_ks", ("model", "tok", "requests", "hparams", "layer", "context_templates")),
    _make_compute_ks,
    common=True,
)


@contextmanager
def remembering(
    original: FunctionType, hparams: Any, kwargs: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Within the block the projectors `P` of a call, a keyword or a name of the function's module,
    remember what they are; gives the keywords to call `original` with.
    """
    names = original.__globals__
    given, held = kwargs.get("P"), names.get("P")
    keyword, chosen = _is_stack(given), given if _is_stack(given) else held
    if not isinstance(chosen, Tensor) or not _is_stack(chosen):
        yield kwargs
        return
    log = _LOGS.setdefault(original.__module__, KeyLog())
    log.layers = list(hparams.layers)
    ours, token = Projectors(chosen, log), _LOG.set(log)
    try:
        if keyword:
            yield {**kwargs, "P": ours}
        else:
            names["P"] = ours
            yield kwargs
    finally:
        _LOG.reset(token)
        if names.get("P") is ours:  # the host may have made itself another one
            names["P"] = held


#: Of the weights that a module's last edit left, by module.
_LEFT: dict[str, tuple[int, ...]] = {}


@contextmanager
def own_history(original: FunctionType, model: Any, hparams: Any, host: Host) -> Iterator[None]:
    """With `fix="history"`: empty the module's `cache_c` unless the weights are those that its last
    edit left. EasyEdit takes an edit back before the next one, and its cache remembers both.
    """
    cache = original.__globals__.get("cache_c")
    if "history" not in host.fixes or not original.__name__.startswith("apply_"):
        yield
        return
    known = original.__module__
    names = [f"{hparams.rewrite_module_tmp.format(layer)}.weight" for layer in hparams.layers]
    if (
        isinstance(cache, Tensor)
        and _is_stack(cache)
        and _LEFT.get(known) != _contents(model, names)
    ):
        cache.zero_()
    yield
    _LEFT[known] = _contents(model, names)


def _contents(model: Any, names: Sequence[str]) -> tuple[int, ...]:
    return tuple(fingerprint(model.get_parameter(name).detach()) for name in names)


def _is_stack(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3 and value.shape[1] == value.shape[2]
