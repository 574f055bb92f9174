"""Which model is this? A digest of its weights that every single-bit change alters, and one of what
else decides its logits: the configuration and the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from knowedit.errors import EditError, ModelError
from knowedit.io.progress import bar

if TYPE_CHECKING:
    from knowedit.models.checkpoint import Checkpoint
    from knowedit.models.editable import EditableModel

CHUNK = 1 << 22  # words of a tensor that are summed with the same places
SLICE = 1 << 16  # words that are multiplied at a time: they stay in the processor's cache
SAMPLES = 16  # numbers of a parameter that are looked at each time

#: Hex digits of earlier digests of configurations, and the fields that they counted, each of them.
EVERY_FIELD = 8
COUNTED = re.compile(
    r"act($|_)|activation|eps|theta|rope|rotary|(?<!initializer_)factor|multiplier|scal|softcap"
    r"|window|layer_types|head|per_tok|top_?k|parallel|norm_before|position_embedding_type|alibi"
)

#: Configuration fields that change what weights of the same shapes compute. The later ones were
#: found by changing every field of every family that transformers builds.
COMPUTES = re.compile(
    COUNTED.pattern
    + r"|soft_cap|clip|limit|lower_bound|time_step|max_distance|alpha|^hc_|^mup_|dim_model_base"
    r"|n_group|expert_group|moe_k$|renormal|jitter|safe_gate|neg_eigval|_cycles|adapter"
    r"|attention_(chunk|layers|types)|causal|bidirectional|qk_norm|residual_connection"
)

#: What tokenizers disagree about: case, blanks, numbers, accents, scripts, code, rare signs.
PROBE = (
    "The capital of France is Paris; isn't it? I'LL SAY:  two  blanks,\ta tab\nand\r\n\n lines. "
    "1234567 3.14159 1,000,000 -7e-5 x+=y**2; def f(a_b): return {'k': [a_b]} // </html> "
    "naïve café Ångström e\u0301 Straße İstanbul ﬁne ½ “quoted” — … Москва Αθήνα القاهرة "
    "दिल्ली 東京 서울 กรุงเทพ 🙂👩‍🔬 \u200b\ufeff antidisestablishmentarianism unbelievable tokenizer"
)


def weights_fingerprint(model: nn.Module) -> str:
    """Digest of a model's parameters: blake2b over name, shape, dtype and a position-dependent
    64-bit sum of the bits; 32 hex digits.

    Every single-bit change alters it. It is a guard against mistakes, not against forgery.

    Raises:
        ModelError: a weight is NaN or infinite: nothing that is made of such a model means
            anything.
    """
    return WeightsWatch().fingerprint(model)


def streamed_fingerprint(model: nn.Module, read: Callable[[str], Tensor]) -> str:
    """The same of a model whose parameters are read by name, one at a time.

    Args:
        model: has the names, in order; its numbers may be on the meta device.

    Raises:
        ModelError: a weight is NaN or infinite.
    """
    digest = hashlib.blake2b(digest_size=16)
    names = [name for name, _ in model.named_parameters()]
    with bar("reading weights", len(names), "weights") as advance:
        for name in names:
            digest.update(_part(model, name, read(name)))
            advance()
    return digest.hexdigest()


class WeightsWatch:
    """The fingerprint of one model whose weights may change: a parameter is read again when it is
    not as it was when it was read.

    Whether it is, is told by the object, where its memory is, torch's count of writes to it, and a
    few of its numbers, for writes that torch does not count (through `.data`): some 10 us each.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Any, bytes]] = {}  # what tells a change, what is digested

    def fingerprint(self, model: nn.Module, edited: Collection[str] = ()) -> str:
        """As `weights_fingerprint`.

        Args:
            edited: names of parameters that count as they were when they were last read.

        Raises:
            ModelError: a weight is NaN or infinite.
            EditError: one of `edited` was never read.
        """
        known, digest = self._seen, hashlib.blake2b(digest_size=16)
        found: dict[str, tuple[Any, bytes]] = {}
        for name, parameter in model.named_parameters():
            if name in edited:
                if name not in known:
                    raise EditError(
                        "the model's fingerprint was never taken before an edit was applied; undo "
                        "the edit first"
                    )
                found[name] = (None, known[name][1])  # to be read again when it is not edited
            else:
                now = _marks(parameter)
                same = name in known and known[name][0] == now
                found[name] = (now, known[name][1] if same else _part(model, name, parameter))
            digest.update(found[name][1])
        self._seen = found
        return digest.hexdigest()

    def as_read(self, parameters: Mapping[str, Tensor]) -> None:
        """These, which were written to, have the bits again that they had when they were read."""
        for name, parameter in parameters.items():
            if name in self._seen:
                self._seen[name] = (_marks(parameter), self._seen[name][1])


def _marks(parameter: Tensor) -> tuple[Any, ...]:
    """What tells that a parameter was changed."""
    tensor = parameter.detach()
    writes = None if parameter.is_inference() else parameter._version
    some: list[float] = []
    if tensor.is_contiguous() and tensor.device.type != "meta" and type(tensor) is Tensor:
        some = tensor.view(-1)[:: max(1, tensor.numel() // SAMPLES)].tolist()
    place = tensor.data_ptr() if type(tensor) is Tensor else None
    return id(parameter), place, writes, tensor.dtype, tensor.device, tuple(tensor.shape), some


def _part(model: nn.Module, name: str, parameter: Tensor) -> bytes:
    """What is digested of a parameter. Raises ModelError: it is not finite."""
    if not _is_finite(parameter.detach()):
        raise ModelError(
            f"{name} of this {type(model).__name__} has weights that are NaN or infinite; its "
            "file is damaged, or was saved after a training that failed: load it again"
        )
    return f"{name}{tuple(parameter.shape)}{parameter.dtype}{_bit_sum(parameter)}".encode()


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are; the sum says so at a glance, unless it overflows."""
    if not tensor.is_floating_point():
        return True
    return bool(tensor.sum(dtype=torch.float64).isfinite()) or bool(tensor.isfinite().all())


def _bit_sum(tensor: Tensor) -> int:
    """Sum of the tensor's 32-bit words (16-bit ones where it has such), each times an odd number of
    its own place, modulo 2**64.
    """
    words = tensor.detach().contiguous().view(-1)
    words = words.view(torch.int16) if tensor.element_size() == 2 else words.view(torch.int32)
    size = SLICE if words.device.type == "cpu" else CHUNK
    place = torch.arange(1, 2 * min(CHUNK, words.numel()), 2, device=words.device)
    products = torch.empty(min(size, words.numel()), dtype=torch.int64, device=words.device)
    total = 0
    for number, chunk in enumerate(words.split(CHUNK)):
        block = 0
        for part, odd in zip(chunk.split(size), place.split(size)):
            block += int(torch.mul(part, odd[: len(part)], out=products[: len(part)]).sum())
        total = (total * 0x9E3779B97F4A7C15 + block * (2 * number + 1)) % (1 << 64)
    return total


# -- what else decides the logits
# -------------------------------------------------------------------------------------------------


def setup_of(config: Any, tokenizer: Any) -> str:
    """Digests of what the configuration computes with the weights, and of what the tokenizer makes
    of a text; 12 and 8 hex digits.
    """
    ids = tokenizer(PROBE, truncation=False, verbose=False)["input_ids"]
    return f"{_digest(computing(config), 6)}-{_digest(list(ids))}"


def difference(model: EditableModel | Checkpoint, fingerprint: str, setup: str = "") -> str | None:
    """In words, how `model` differs from the one of which these are recorded; None: in nothing.

    Args:
        setup: empty in records of earlier versions, which knew the weights only.
    """
    if model.fingerprint != fingerprint:
        return "other weights or another dtype"
    if not setup or model.setup == setup:
        return None
    mine, recorded = model.setup.split("-"), setup.split("-")
    if len(recorded) != len(mine):
        return f"the same weights, but {setup[:40]!r} names no configuration and tokenizer"
    if len(recorded[0]) == EVERY_FIELD:
        held: Any = getattr(model, "hf", model)  # a model's own, or a checkpoint's
        every = _text_config(held.config).to_dict()
        mine[0] = _digest(sorted(set(_named(every, COUNTED))))
    computes, reads = (a != b for a, b in zip(mine, recorded))
    if not computes and not reads:
        return None
    what = ["another configuration (activation, norms, positions or heads)"] * computes
    return "the same weights, but " + " and ".join([*what, *["another tokenizer"] * reads])


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def computing(config: Any) -> tuple[tuple[str, str], ...]:
    """The model type, then names and values of the fewest fields of a configuration that change
    logits and from which its class makes the rest.

    What a class fills in by itself (a default, a number that follows from others) says nothing
    about a model, and is there or not with the version of transformers.
    """
    texts = _text_config(config)
    record = json.dumps(texts.to_dict(), sort_keys=True, default=str)
    kind: Any = type(texts)
    return ("model_type", str(texts.model_type)), *_fewest(kind, record)


@lru_cache(maxsize=64)
def _fewest(kind: Any, text: str) -> tuple[tuple[str, str], ...]:
    """As `computing`, of a class and a configuration of it as JSON."""
    needed = json.loads(text)
    whole, told = _relevant(needed), {}
    for name in sorted(whole):
        without = {other: value for other, value in needed.items() if other != name}
        made = _made(kind, without)
        if made == whole:
            needed = without
        else:
            told[name] = _unlike(whole[name], made.get(name))
    return tuple(sorted(set(_named(told))))


def _made(kind: Any, record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that change logits of what a class makes of a record; none where it does not."""
    try:
        made = kind.from_dict(dict(record)).to_dict()
    except Exception:  # a field without which this class, anybody's code, cannot be made
        return {}
    return _relevant(json.loads(json.dumps(made, default=str)))


def _relevant(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that change logits, or have such within them."""
    return {name: value for name, value in record.items() if any(_named({name: value}))}


def _unlike(value: Any, default: Any) -> Any:
    """A field's value; of one with fields of its own, those that are not as in the default."""
    if not isinstance(value, Mapping) or not isinstance(default, Mapping):
        return value
    return {n: _unlike(v, default.get(n)) for n, v in value.items() if v != default.get(n)}


def _named(
    record: Mapping[str, Any], counted: re.Pattern[str] = COMPUTES
) -> Iterator[tuple[str, str]]:
    """Names and values of the fields that change logits, also of those within fields."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _named(value, counted)
        elif value is not None and counted.search(str(name)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            yield str(name), repr(float(value)) if number else json.dumps(value, default=str)


def _digest(value: Any, size: int = 4) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=size).hexdigest()
