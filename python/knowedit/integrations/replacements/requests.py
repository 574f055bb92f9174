"""What a host is about to work on: its entry points tell the requests that the functions below them
are then asked for one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

from torch import Tensor

from knowedit.integrations.discovery import Signature
from knowedit.integrations.hosts import Host
from knowedit.integrations.replacements.base import Replacement
from knowedit.integrations.replacements.covariance import own_history, remembering
from knowedit.integrations.replacements.kept import Kept

#: What tells one request from another: prompt, subject, target.
Key = tuple[str, str, str]


@dataclass
class Job:
    """The requests and hyper-parameters of one call of an entry point.

    Attributes:
        requests: as they were given.
        hparams: the host's hyper-parameters.
        cache_template: of the files with values that the host may read instead.
        values: `[hidden]` of requests that were optimised together, until they are fetched.
        version: of the weights these belong to.
        states: hidden states of its prompts, kept from layer to layer.
    """

    requests: list[Any]
    hparams: Any
    cache_template: str | None = None
    values: dict[Key, Tensor] = field(default_factory=dict)
    version: tuple[int, ...] = ()
    states: Kept = field(default_factory=Kept)

    def from_here(self, key: Key, layer: int) -> list[dict[str, Any]]:
        """The request of this key and those after it that no file of the host's has a value of;
        none when the request is not one of the job's.
        """
        requests = [normal(request) for request in self.requests]
        keys = [key_of(request) for request in requests]
        if key not in keys:
            return []
        first, *rest = requests[keys.index(key) :]
        return [first] + [request for request in rest if not self._in_a_file(request, layer)]

    def _in_a_file(self, request: Mapping[str, Any], layer: int) -> bool:
        if self.cache_template is None or "case_id" not in request:
            return False
        clamp = getattr(self.hparams, "clamp_norm_factor", None)
        return Path(str(self.cache_template).format(layer, clamp, request["case_id"])).exists()


_JOB: ContextVar[Job | None] = ContextVar("job", default=None)


def current_job() -> Job | None:
    return _JOB.get()


def target_of(request: Mapping[str, Any]) -> str:
    """The new object: `target_new`, which is a text or has one as `str`."""
    target = request["target_new"]
    return str(target["str"] if isinstance(target, Mapping) else target)


def key_of(request: Mapping[str, Any]) -> Key:
    return request["prompt"], request["subject"], target_of(request)


def normal(request: Mapping[str, Any]) -> dict[str, Any]:
    """A request as the hosts change it before they work: a space in front of the target, `{}` for
    the subject in the prompt.
    """
    changed = copy.deepcopy(dict(request))
    text = target_of(request)
    text = text if text.startswith(" ") else " " + text
    if isinstance(changed["target_new"], dict):
        changed["target_new"]["str"] = text
    else:
        changed["target_new"] = text
    if "{}" not in changed["prompt"]:
        changed["prompt"] = changed["prompt"].replace(changed["subject"], "{}")
    return changed


@contextmanager
def job(requests: Any, hparams: Any, cache_template: Any) -> Iterator[None]:
    """Within the block `current_job()` is this one."""
    listed = [requests] if isinstance(requests, Mapping) else list(requests)
    token = _JOB.set(Job(listed, hparams, cache_template))
    try:
        yield
    finally:
        _JOB.reset(token)


def _make(original: FunctionType, host: Host) -> Callable[..., Any]:
    def entry(model: Any, tok: Any, requests: Any, hparams: Any, *args: Any, **kwargs: Any) -> Any:
        template = kwargs.get("cache_template")
        with (
            own_history(original, model, hparams, host),
            job(requests, hparams, template),
            remembering(original, hparams, kwargs) as changed,
        ):
            return original(model, tok, requests, hparams, *args, **changed)

    return entry


_MORE = (
    "copy return_orig_weights cache_template keep_original_weight reset_cache cache_c P"
).split()
ENTRY = Replacement(
    "runs as it is; tells the others which requests and layers come",
    Signature(
        r"(execute|apply)_\w+",
        ("model", "tok", "requests", "hparams"),
        tuple(_MORE),
        keywords=True,
    ),
    _make,
    common=True,
)
