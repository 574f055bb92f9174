"""Key statistics on disk: one safetensors file a layer, the packed lower triangle of sum(k kᵀ) and
a JSON header.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from knowedit.errors import StatisticsError
from knowedit.io.files import atomic_file, cache_dir

FORMAT = "knowedit-statistics/1"


@dataclass(frozen=True)
class Recipe:
    """What was collected, and from what: two files with equal recipes hold the same statistics.

    Attributes:
        fingerprint: of the model's unedited weights.
        corpus: name and digest of the text (`text.corpus_fingerprint`).
        tokens: keys asked for.
        max_length: documents are cut into pieces of at most this many tokens.
        skip_first: the first token of a piece is left out (it is the model's attention sink).
        seed: of the corpus' order, or of the model's own samples.
        precision: of the accumulation (`knowedit_kernels.SecondMoment`).
        until: "tokens": exactly so many; "solve", "converged": that many at most (see
            `convergence`).
        tolerance: relative error at which to stop, or None.
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

    @property
    def slug(self) -> str:
        """A readable folder name, unique to the recipe."""
        import hashlib

        digest = hashlib.blake2b(
            json.dumps(asdict(self), sort_keys=True).encode(), digest_size=6
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
        first_norm, other_norm: root mean square norm of the keys at first tokens, and median-like
            norm of the others.
        extra: audit result, padding, versions.
    """

    layer: int
    module: str
    model: str
    recipe: Recipe
    count: int
    total: Tensor
    first_norm: float
    other_norm: float
    extra: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write atomically.

        Raises:
            StatisticsError: the disk is full or not writable; an older file is left as it was.
        """
        header = {k: v for k, v in asdict_shallow(self).items() if k != "total"}
        header["recipe"], header["format"] = asdict(self.recipe), FORMAT
        tensors = {"lower": pack_lower(self.total)}
        write(path, tensors, header)

    @classmethod
    def load(cls, path: Path) -> LayerStatistics:
        """Read a file.

        Raises:
            StatisticsError: missing, truncated, or not a statistics file; the message has the
                remedy.
        """
        header, tensors = read(path)
        if header.get("format") != FORMAT or "lower" not in tensors:
            raise StatisticsError(
                f"{path} is not a statistics file of this version (format {header.get('format')!r})"
            )
        known = {
            name: header[name]
            for name in ("layer", "module", "model", "count", "first_norm", "other_norm", "extra")
        }
        return cls(recipe=Recipe(**header["recipe"]), total=unpack_lower(tensors["lower"]), **known)


def folder(model_name: str, recipe: Recipe) -> Path:
    """Where files of this recipe live in the cache."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", model_name.rstrip("/").rsplit("/", 1)[-1])
    return cache_dir("statistics", f"{name}-{recipe.fingerprint[:12]}", recipe.slug)


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
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata={"knowedit": json.dumps(header)})
    except (OSError, SafetensorError) as error:
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
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("knowedit", "{}"))
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise StatisticsError(
            f"{path} is truncated or damaged ({error}); delete it and collect again"
        ) from error


def header(path: Path) -> dict[str, Any]:
    """The header alone, without reading the sums. Raises StatisticsError when the file is damaged
    or no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get("knowedit", "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise StatisticsError(
            f"{path} is truncated or damaged ({error}); delete it and collect again"
        ) from error
    if found.get("format") != FORMAT:
        raise StatisticsError(
            f"{path} is not a statistics file of this version (format {found.get('format')!r})"
        )
    return found


def asdict_shallow(item: Any) -> dict[str, Any]:
    return {name: getattr(item, name) for name in item.__dataclass_fields__}


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
