"""What is tried when a model is opened: parts of it, run as editing runs them, against its plain
forward pass.

A model whose logits, changed weights or padded batches are not what the plain pass makes of them is
refused, with the figures; where only the replay of single layers fails, the whole model is run
instead. What was found is remembered for models of the same code, configuration and shapes: in
memory, and on the disk for large ones. The head and the presence of finite numbers are tried every
time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from knowedit.errors import ModelError
from knowedit.io.files import atomic_file, cache_dir
from knowedit.io.tensors import MISREAD
from knowedit.io.versions import software_versions
from knowedit.models import partial
from knowedit.models.experts import Experts, WideProjection, as_keys
from knowedit.models.partial.comparing import check_rows, off
from knowedit.models.probing import Stream, check_finite, direction, run, states_of
from knowedit.models.structure import Head, Layout, Part, memory_shared

if TYPE_CHECKING:
    from knowedit.models.editable import EditableModel

#: Of what is remembered; another one is found anew.
FORMAT = 5

#: Models with fewer parameters are checked in milliseconds, and not remembered on the disk.
SMALL = 20_000_000

_REMEMBERED: dict[str, Checkup] = {}


@dataclass(frozen=True)
class Check:
    """One comparison with the plain forward pass.

    Attributes:
        name: what was tried.
        error: the relative difference; infinite when it could not be run.
        outcome: what follows from it.
    """

    name: str
    error: float
    outcome: str


@dataclass(frozen=True)
class Checkup:
    """What is known of a model's parts.

    Attributes:
        layout: where they are.
        replays: whether layers can be run one by one.
        checks: what was tried.
    """

    layout: Layout
    replays: bool
    checks: tuple[Check, ...]


# -- what is remembered
# -------------------------------------------------------------------------------------------------


def remembered(hf: nn.Module) -> Checkup | None:
    """What was found of a model like this before, or None."""
    if put_around(hf):
        return None
    key = _key(hf)
    if key not in _REMEMBERED and _is_large(hf):
        try:
            record = json.loads(_file(key).read_text("utf-8"))
            if record.pop("of") == key:
                _REMEMBERED[key] = _from_record(record)
        except (OSError, *MISREAD):  # none, or not one of ours
            return None
    return _REMEMBERED.get(key)


def remember(hf: nn.Module, found: Checkup) -> None:
    """Keep what was found; a disk that cannot be written costs the next opening its checks, and
    nothing else. Nothing is kept of modules with something around their code, which is not known.
    """
    if put_around(hf):
        return
    key = _key(hf)
    _REMEMBERED[key] = found
    if _is_large(hf):
        try:
            with atomic_file(_file(key)) as path:
                path.write_text(json.dumps({"of": key, **asdict(found)}), "utf-8")
        except OSError:
            pass


def _file(key: str) -> Path:
    return cache_dir("checkups") / f"{key}.json"


def _is_large(hf: nn.Module) -> bool:
    return sum(parameter.numel() for parameter in hf.parameters()) >= SMALL


def put_around(hf: nn.Module) -> list[tuple[str, int]]:
    """Modules that do not only what their classes say, by name, and how many hooks they have: a
    function of their own instead of their `forward` counts as one (accelerate's moves tensors, and
    nothing else).
    """
    found = (
        (name, len(m._forward_hooks) + len(m._forward_pre_hooks) + _has_own_forward(m))
        for name, m in hf.named_modules()
    )
    return [(name, count) for name, count in found if count]


def _has_own_forward(module: nn.Module) -> bool:
    return "forward" in vars(module) and not hasattr(module, "_hf_hook")


def _key(hf: Any) -> str:
    """Digest of everything that what is found depends on: code, configuration, shapes, how weights
    lie in memory and which share it, and the values of the small parameters (scales and norms).
    """
    digest = hashlib.blake2b(digest_size=16)

    def add(*parts: Any) -> None:
        digest.update(repr(parts).encode())

    config = {k: v for k, v in hf.config.to_dict().items() if k != "_name_or_path"}
    add(FORMAT, software_versions(("torch", "transformers", "knowedit-kernels")))
    add(json.dumps(config, sort_keys=True, default=str))
    add(getattr(hf.config, "_attn_implementation", None))
    for name, module in hf.named_modules():
        add(name, type(module).__module__, type(module).__qualname__)
    shared = memory_shared(hf)
    for name, p in hf.named_parameters(remove_duplicate=False):
        add(name, shared.get(name), type(p.data).__name__, p.dtype, tuple(p.shape), p.device.type)
        add(p.is_inference(), p.stride() if p.layout == torch.strided else p.layout)
        if p.dim() < 2 and p.device.type != "meta" and type(p.data) is Tensor:
            add(p.detach().double().sum().item(), p.detach().double().square().sum().item())
    for name, buffer in hf.named_buffers():
        add(name, type(buffer).__name__, buffer.dtype, tuple(buffer.shape))
    return digest.hexdigest()


def _from_record(record: Mapping[str, Any]) -> Checkup:
    """The reverse of `asdict`, through JSON. Raises KeyError or TypeError."""
    layout = record["layout"]

    def parts(kind: str) -> dict[int, Part]:
        return {
            int(index): Part(
                **{
                    **part,
                    "stream": Stream(**part["stream"]),
                    "reads": tuple(part["reads"]),
                    "experts": Experts(**part["experts"]) if part["experts"] else None,
                    "beside": None,  # of a view of a layout, and not of what was found
                }
            )
            for index, part in layout[kind].items()
        }

    paths = {
        name: {int(index): tuple(found) for index, found in layout[name].items()}
        for name in ("mixers", "mlps")
    }
    whole = Layout(
        **{
            **layout,
            **paths,
            "head": Head(**layout["head"]),
            "parts": parts("parts"),
            "shared": parts("shared"),
            "refused": {int(index): why for index, why in layout["refused"].items()},
        }
    )
    checks = tuple(Check(**check) for check in record["checks"])
    return Checkup(whole, record["replays"], checks)


# -- what is tried
# -------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_head(model: EditableModel) -> Check:
    """The model's logits on a few tokens against those of `EditableModel.head`.

    Raises:
        ModelError: they differ, or they are not finite.
    """
    ids = model.pad([check_rows(model)[0][1].ids])[0]
    found: list[Tensor] = []
    handle = model.base.register_forward_hook(
        lambda _m, _x, output: found.append(states_of(output))
    )
    try:
        wanted = run(model.hf, ids).logits
    finally:
        handle.remove()
    states = found[0]
    check_finite(states, model.name)
    error = off(model.head(states), wanted)
    if error > model.rounding:
        raise ModelError(
            f"{model.name}: logits of its final hidden states differ from its own by {error:.1e} "
            "(relative): what it does between them is not known, so no result could be trusted"
        )
    return Check("head", error, f"{model.layout.head.kind} head")


@torch.no_grad()
def check_parts(model: EditableModel) -> tuple[bool, list[Check]]:
    """Whether layers can be run one by one, and every other comparison.

    Raises:
        ModelError: a changed weight or a padded batch is not what the plain pass makes of it, or
            earlier tokens see later ones.
    """
    limit = model.rounding
    replay = partial.replays(model)
    replays = replay <= limit
    way = "layers run one by one" if replays else "the whole model runs instead: slower, the same"
    checks = [Check("replay", replay, way)]
    rows = [row.ids for row in check_rows(model)[0]]
    alone = [model.final_states(model.pad([ids])[0])[0] for ids in rows]
    for states in alone:
        check_finite(states, model.name)
    padded = model.final_states(model.pad(rows)[0])
    error = max(off(padded[i, : len(ids)], alone[i]) for i, ids in enumerate(rows))
    if error > limit:
        raise ModelError(
            f"{model.name}: a text's hidden states differ by {error:.1e} (relative) with padding "
            "behind it: earlier tokens see later ones, so this is no causal model"
        )
    checks.append(Check("padded batch", error, "as each text alone"))
    begun = [len(ids) // 2 for ids in rows]
    first = (model.final_states(model.pad([ids[:n]])[0])[0] for ids, n in zip(rows, begun))
    error = max(off(states, whole[:n]) for states, whole, n in zip(first, alone, begun))
    if error > limit:
        raise ModelError(
            f"{model.name}: hidden states differ by {error:.1e} (relative) when the text goes on "
            "behind them: earlier tokens see later ones, so this is no causal model"
        )
    checks.append(Check("later tokens", error, "not seen by earlier ones"))
    seen = [model, model.editing("shared")] if model.layout.shared else [model]
    tried = {
        part.layout.weight_name(layer): _realised(part, layer, rows[1])
        for part in seen
        for layer in _one_of_each(part)
    }
    weight, error = max(tried.items(), key=lambda found: found[1])
    if error > limit:
        raise ModelError(
            f"{model.name}: what a change of {weight} does "
            f"differs by {error:.1e} (relative) from what its key says: the module does not "
            "multiply by this weight, so an edit would not be what is computed"
        )
    checks.append(Check("changed weight", error, "as computed"))
    error = _packed(model, rows, alone)
    apart = "texts behind each other stay apart" if error <= limit else "texts are not packed"
    return replays, [*checks, Check("packed texts", error, apart)]


def _one_of_each(model: EditableModel) -> list[int]:
    """An editable layer of each kind, dense and with routed experts, of each class and with what
    stands around it; neither the first nor the last where there are others.
    """
    layout, around = model.layout, dict(put_around(model.hf))
    kinds: dict[Any, list[int]] = {}
    for layer in layout.editable:
        path = layout.projection(layer)
        hooks = around.get(path, 0), around.get(layout.mlp(layer), 0)
        kind = layout.experts(layer) is None, type(model.hf.get_submodule(path)), hooks
        kinds.setdefault(kind, []).append(layer)
    return [kind[len(kind) // 2] for kind in kinds.values()]


def _realised(model: EditableModel, layer: int, ids: list[int]) -> float:
    """The output of a projection with a changed weight against the unchanged one plus what the
    change makes of its inputs.
    """
    name, projection, seen = model.layout.weight_name(layer), model.projection(layer), []
    text = model.pad([ids])[0]

    def see(given: Any, output: Tensor) -> None:
        seen.append((as_keys(given), output))

    def look() -> None:
        with partial.hooked({projection: see}):
            model.final_states(text)

    def stored(change: Tensor) -> Tensor:
        if isinstance(projection, WideProjection):
            return projection.stored(change)
        return change.mT if model.layout.transposed else change

    look()
    keys, plain = seen[0]
    keys, plain = (states.reshape(-1, states.shape[-1]) for states in (keys, plain))
    key = keys[-1].float()
    size = plain.float().square().mean().sqrt()
    left, right = direction(plain).float() * size, key / key.square().sum().clamp(min=1e-30)
    change, weight = torch.outer(left, right), model.weight(layer).detach()
    changed = weight + stored(change).to(weight)
    partial.with_weights(model, {name: changed}, look)
    made = (changed.float() - weight.float()).to(weight)
    moved = _through(projection, keys, made, model.layout.transposed)
    after = seen[1][1].reshape(plain.shape)
    return off(after - plain, moved) * min(1.0, float(moved.norm() / plain.norm()))


def _through(projection: nn.Module, keys: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """`[n, hidden]` what a projection with this weight makes of keys."""
    if isinstance(projection, WideProjection):
        return projection.times(keys, weight)
    return keys @ (weight if transposed else weight.mT)


def _packed(model: EditableModel, rows: list[list[int]], alone: list[Tensor]) -> float:
    """Texts behind each other in one row, each with positions of its own, against each alone."""
    joined = model.pad([[token for ids in rows for token in ids]])[0]
    places = torch.cat([torch.arange(len(ids)) for ids in rows])[None].to(joined.device)
    try:
        found = model.final_states(joined, places)[0]
    except Exception:  # whatever a model's own code raises for positions it does not take
        return float("inf")
    return off(found, torch.cat(alone))
