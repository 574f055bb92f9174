"""Key statistics on disk: one safetensors file a layer, the packed lower triangle of sum(k kᵀ) and
a JSON header.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knowedit.errors import StatisticsError
from knowedit.io.files import cache_dir
from knowedit.io.tensors import opened, understood, write_file

FORMAT = "knowedit-statistics/1"
FORMAT_EXPERTS = "knowedit-statistics-of-experts/1"
REMEDY = "delete it and collect again"
#: What each field of a header is.
KINDS: dict[str, Any] = {
    "layer": int,
    "module": str,
    "model": str,
    "count": int,
    "first_norm": (int, float),
    "other_norm": (int, float),
}
#: How to read the headers of earlier formats: format -> the header one format later, with its name.
MIGRATIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {}


@dataclass(frozen=True)
class CollectionRecipe:
    """What was collected, and from what: two files with equal recipes hold the same statistics.

    Attributes:
        fingerprint: of the model's unedited weights.
        corpus: name and digest of the text (`Corpus.identity`).
        tokens: keys asked for.
        max_length: documents are cut into pieces of at most this many tokens.
        skip_first: the first token of a piece is left out (it is the model's attention sink).
        seed: of the corpus' order, or of the model's own samples; 0 for files, which are read in
            their own order.
        precision: of the accumulation (`knowedit_kernels.SecondMoment`).
        until: "tokens": exactly so many; "solve", "converged": that many at most (see
            `convergence`).
        tolerance: relative error at which to stop, or None.
        start: the tokens that every piece begins with (`models.tokens.start_tokens`).
        experts: of layers with experts, which ("routed" or "shared").
        setup: of the model's configuration and tokenizer (`EditableModel.setup`); empty in files of
            earlier versions. Not what makes two recipes equal: whoever reads a file compares it.
    """

    fingerprint: str
    corpus: dict[str, Any]
    tokens: int
    max_length: int
    skip_first: bool
    seed: int
    precision: str = "exact"
    until: str = "tokens"
    tolerance: float | None = None
    start: tuple[int, ...] = ()
    setup: str = field(default="", compare=False)
    experts: str = "routed"

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", tuple(self.start))  # JSON has lists
        if "files" in self.corpus:
            object.__setattr__(self, "seed", 0)

    @property
    def record(self) -> dict[str, Any]:
        """What makes it equal to others, as JSON has it; without a start token, or of routed
        experts, the same as before there were fields for these.
        """
        found = {k: v for k, v in asdict(self).items() if k != "setup"}
        usual = {"start": (), "experts": "routed"}
        return {k: v for k, v in found.items() if k not in usual or v != usual[k]}

    @property
    def slug(self) -> str:
        """A readable folder name, unique to the recipe."""
        digest = hashlib.blake2b(
            json.dumps(self.record, sort_keys=True).encode(), digest_size=6
        ).hexdigest()
        name = re.sub(r"[^A-Za-z0-9.]+", "-", str(self.corpus.get("name", "corpus"))).strip("-")[
            -40:
        ]
        return f"{name}-{self.tokens}-{digest}"


@dataclass(frozen=True)
class LayerStatistics:
    """sum(k kᵀ) of one layer and how it came to be.

    Attributes:
        layer, module: index and name of the projection whose inputs these are.
        count: keys summed.
        total: `[d_ff, d_ff]` float64, symmetric.
        first_norm, other_norm: mean norm of the keys at first tokens, and of the others.
        counts: of routed experts, tokens that each was given; `total` is `[E, d, d]` then.
        extra: audit result, padding, convergence, versions.
    """

    layer: int
    module: str
    model: str
    recipe: CollectionRecipe
    count: int
    total: Tensor
    first_norm: float
    other_norm: float
    extra: dict[str, Any] = field(default_factory=dict)
    counts: tuple[int, ...] = ()

    @cached_property
    def digest(self) -> str:
        """blake2b of the lower triangle of `total`, row by row in little-endian float64: the same
        in memory, in a file, and after reading it. 32 hex digits.
        """
        digest = hashlib.blake2b(digest_size=16)
        for matrix in self.total.cpu() if self.counts else (self.total.cpu(),):
            for i, row in enumerate(matrix):
                # no negative zeros
                digest.update((row[: i + 1] + 0.0).numpy().astype("<f8").tobytes())
        return digest.hexdigest()

    @property
    def energy(self) -> float:
        """The mean square length of a key, the trace of C."""
        return float(self.total.diagonal(dim1=-2, dim2=-1).sum()) / self.count

    @property
    def first_ratio(self) -> float:
        """Norm of first-token keys over that of the others."""
        return self.first_norm / max(self.other_norm, 1e-30)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells these statistics from others, for the record of an edit made with them.

        `fingerprint` of the model, `corpus` (`Corpus.identity`), `tokens` summed, `digest` of the
        sums; as JSON has it.
        """
        return {
            "fingerprint": self.recipe.fingerprint,
            "corpus": self.recipe.corpus,
            "tokens": self.count,
            "digest": self.digest,
        }

    def save(self, path: Path) -> None:
        """Write atomically.

        Raises:
            StatisticsError: the disk is full or not writable; an older file is left as it was.
        """
        header = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "total"}
        header["recipe"] = self.recipe.record
        header["recipe"] |= {"setup": self.recipe.setup} if self.recipe.setup else {}
        if self.counts:
            header["format"] = FORMAT_EXPERTS
            lower = torch.stack([pack_lower(matrix) for matrix in self.total])
        else:  # the same as before there were any of experts
            del header["counts"]
            header["format"], lower = FORMAT, pack_lower(self.total)
        write(path, {"lower": lower}, header)

    @classmethod
    def load(cls, path: Path) -> LayerStatistics:
        """Read a file.

        Raises:
            StatisticsError: missing, truncated, or not a statistics file; the message has the
                remedy.
        """
        found, tensors = read(path)
        found = _migrated(found, path)
        with understood(path, "a statistics file", StatisticsError, REMEDY):
            known = {name: found[name] for name in KINDS}
            recipe = CollectionRecipe(**found["recipe"])
            lower, counts = tensors["lower"], tuple(found.get("counts", ()))
            total = torch.stack([*map(unpack_lower, lower)]) if counts else unpack_lower(lower)
            for name, kinds in KINDS.items():
                if not isinstance(known[name], kinds):
                    raise TypeError(f"{name} is {known[name]!r}")
            if not isinstance(recipe.corpus, dict):
                raise TypeError(f"recipe.corpus is {recipe.corpus!r}")
            extra = dict(found.get("extra", {}))
            return cls(recipe=recipe, total=total, extra=extra, counts=counts, **known)


def folder(
    model_name: str, recipe: CollectionRecipe, is_other: Callable[[str], bool] = lambda _: False
) -> Path:
    """Where files of this recipe live in the cache: fingerprint, setup and recipe decide, the
    model's name only makes a new folder readable.

    Args:
        is_other: whether a recorded setup is that of another model with the same weights, whose
            statistics stay where they are.
    """
    digest, taken = recipe.fingerprint[:12], False
    for known in sorted(cache_dir("statistics").glob(f"*-{digest}/{recipe.slug}*")):
        for file in known.glob("layer-*.safetensors"):
            if not is_other(_setup(file)):
                return known
            taken = True
            break
    name = re.sub(r"[^A-Za-z0-9.]+", "-", model_name.rstrip("/").rsplit("/", 1)[-1])
    slug = f"{recipe.slug}-{recipe.setup}" if taken else recipe.slug
    return cache_dir("statistics", f"{name}-{digest}", slug)


def _setup(path: Path) -> str:
    """The setup that a file records; none where it is damaged, which reading it will say."""
    try:
        return str(header(path)["recipe"].get("setup", ""))
    except StatisticsError:
        return ""


def files(where: Path) -> list[Path]:
    """All statistics files in a folder and those below it, or the file itself. Raises
    StatisticsError: no such place.
    """
    if not where.exists():
        raise StatisticsError(f"{where}: there is no such file or folder")
    return [where] if where.is_file() else sorted(where.rglob("layer-*.safetensors"))


def layer_file(directory: Path, layer: int) -> Path:
    return directory / f"layer-{layer:03d}.safetensors"


def write(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """A safetensors file with a JSON header, written atomically. Raises StatisticsError when the
    disk refuses.
    """
    try:
        write_file(path, tensors, header)
    except OSError as error:
        raise StatisticsError(
            f"{path} could not be written ({error}); free disk space or set KNOWEDIT_CACHE to "
            f"another disk, "
            "then run again: what was collected up to the last checkpoint is kept"
        ) from error


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file written by `write`. Raises StatisticsError when it is missing or
    damaged.
    """
    if not path.is_file():
        raise StatisticsError(
            f"{path}: there is no such statistics file; collect it with `knowedit stats`"
        )
    with opened(path, StatisticsError, REMEDY) as file:
        return file.header, file.tensors()


def header(path: Path) -> dict[str, Any]:
    """The header alone, in this version's format, without reading the sums. Raises StatisticsError
    when the file is damaged or no such file.
    """
    with opened(path, StatisticsError, REMEDY) as file:
        return _migrated(file.header, path)


def _migrated(header: dict[str, Any], path: Path) -> dict[str, Any]:
    """The header as this version writes it."""
    while (number := header.get("format")) not in (FORMAT, FORMAT_EXPERTS):
        if not isinstance(number, str) or number not in MIGRATIONS:
            raise StatisticsError(
                f"{path} is not a statistics file of this version (format {number!r})"
            )
        header = MIGRATIONS[number](header)
    return header


def pack_lower(matrix: Tensor) -> Tensor:
    """Rows of the lower triangle, one after another: half the size of the square."""
    return torch.cat([matrix[i, : i + 1] for i in range(len(matrix))])


def unpack_lower(packed: Tensor) -> Tensor:
    """The symmetric matrix of `pack_lower`."""
    size = int((2 * packed.numel() + 0.25) ** 0.5)
    matrix = torch.zeros(size, size, dtype=packed.dtype)
    start = 0
    for i in range(size):
        matrix[i, : i + 1] = packed[start : start + i + 1]
        start += i + 1
    return matrix + matrix.tril(-1).T
