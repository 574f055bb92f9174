"""Checkpoints of a collection: one file a rank, written atomically, the old ones kept until all new ones are there.

With the same number of ranks each goes on from its own file. With another number rank 0 takes the sums of all files (it
must see them: use a folder that all nodes share) and the others start from zero, which adds up to the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from knowedit_kernels import SecondMoment

from ..errors import StatisticsError
from . import store
from .ranks import Ranks
from .store import Recipe
from .sums import Seen

logger = logging.getLogger(__name__)

State = dict[tuple[int, int], dict[str, Tensor]]  # of (half, layer): `SecondMoment.state_dict`


@dataclass
class Place:
    """How far a collection is, the same on every rank: windows done, documents of each lane, keys of each half."""

    windows: int
    taken: list[int]
    counts: list[int]
    looks: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    converged: bool = False

    @property
    def count(self) -> int:
        return sum(self.counts)


class Checkpoints:
    """The files of one recipe and set of layers in a folder."""

    def __init__(self, where: Path, layers: Sequence[int], recipe: Recipe, ranks: Ranks) -> None:
        self.where, self.ranks, self.layers = where, ranks, set(layers)
        what = json.dumps([list(layers), asdict(recipe)], sort_keys=True)
        self._tag = hashlib.blake2b(what.encode(), digest_size=6).hexdigest()

    def save(self, place: Place, seen: Seen, moments: Mapping[tuple[int, int], SecondMoment]) -> None:
        """Write this rank's file; when all have, drop the older ones. A disk that is full is a warning: the run goes on."""
        tensors = {f"{half}.{layer}.{k}": v for (half, layer), m in moments.items() for k, v in m.state_dict().items()}
        written = True
        try:
            store.write(self._file(place.windows, self.ranks.rank, self.ranks.size), tensors, {**asdict(place), **asdict(seen)})
        except StatisticsError as error:
            written = False
            logger.warning("no checkpoint: %s", error)
        if all(self.ranks.gather(written)):
            for windows, rank, size in self._visible():
                if windows < place.windows:
                    self._file(windows, rank, size).unlink(missing_ok=True)

    def load(self) -> tuple[Place, Seen | None, State] | None:
        """What this rank goes on from (a rank that starts from zero: only the place), or None.

        Raises:
            StatisticsError: a file is damaged.
        """
        visible = self.ranks.gather(self._visible())
        for windows, size in sorted({(w, s) for w, _, s in set().union(*visible)}, reverse=True):
            if size == self.ranks.size and all((windows, rank, size) in seen for rank, seen in enumerate(visible)):
                return self._read([(windows, self.ranks.rank, size)])
            if all((windows, rank, size) in visible[0] for rank in range(size)):
                mine = self._read([(windows, r, size) for r in range(size)]) if self.ranks.rank == 0 else None
                place = self.ranks.gather(mine and mine[0])[0]
                return mine or (place, None, {})  # type: ignore[return-value]
        return None

    def drop(self) -> None:
        """When the result is written: delete all files, and those of other sets of layers with one of these in it."""
        self.ranks.gather(None)
        for windows, rank, size in self._visible():
            self._file(windows, rank, size).unlink(missing_ok=True)
        for path in self.where.glob("checkpoint-*.safetensors") if self.ranks.rank == 0 else ():
            with suppress(SafetensorError, FileNotFoundError):
                with safe_open(path, framework="pt") as file:
                    layers = {int(name.split(".")[1]) for name in file.keys()}  # noqa: SIM118
                if layers & self.layers:
                    path.unlink(missing_ok=True)

    def _read(self, files: Sequence[tuple[int, int, int]]) -> tuple[Place, Seen, State]:
        """The sum of some ranks' files."""
        place: Place | None = None
        seen: Seen | None = None
        total: State = {}
        for file in files:
            header, tensors = store.read(self._file(*file))
            part = Seen(header["norms"], header["padded"], header["text"])
            place = Place(*(header[name] for name in ("windows", "taken", "counts", "looks", "converged")))
            seen = seen.add(part) if seen else part
            for name, tensor in tensors.items():
                half, layer, kind = name.split(".")
                state = total.setdefault((int(half), int(layer)), {})
                state[kind] = state[kind] + tensor if kind in state and kind != "pending" else tensor
        assert place is not None and seen is not None
        return place, seen, total

    def _file(self, windows: int, rank: int, size: int) -> Path:
        return self.where / f"checkpoint-{self._tag}.{windows:08d}.{rank}-of-{size}.safetensors"

    def _visible(self) -> set[tuple[int, int, int]]:
        pattern = re.compile(rf"checkpoint-{self._tag}\.(\d+)\.(\d+)-of-(\d+)\.safetensors")
        found = (pattern.fullmatch(path.name) for path in self.where.glob(f"checkpoint-{self._tag}.*"))
        return {(int(m[1]), int(m[2]), int(m[3])) for m in found if m}
