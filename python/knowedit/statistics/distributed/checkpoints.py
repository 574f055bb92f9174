"""Checkpoints of a collection: one file a rank, written atomically, the old ones kept until all new
ones are there.

With the same number of ranks each goes on from its own file. With another number rank 0 takes the
sums of all files (it must see them: use a folder that all nodes share) and the others start from
zero, which adds up to the same.
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

from torch import Tensor

from knowedit.errors import StatisticsError
from knowedit.io.ranks import Ranks
from knowedit.io.tensors import opened
from knowedit.statistics.files import store
from knowedit.statistics.files.store import CollectionRecipe
from knowedit.statistics.sums import KeyTally, Moment

logger = logging.getLogger(__name__)

INCOMPLETE = ".incomplete"  # behind the name of a checkpoint that could not be gone on from
MomentStates = dict[tuple[int, int], dict[str, Tensor]]  # of (half, layer): their state_dict


@dataclass
class CollectionState:
    """How far a collection is, the same on every rank.

    Attributes:
        windows: how many are done.
        documents: read of each lane.
        counts: keys of each half.
        checks: what the convergence checks found, by layer.
        converged: whether the last of them found it good enough.
        commits: of the hub data sets that are read.
    """

    windows: int
    documents: list[int]
    counts: list[int]
    checks: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    converged: bool = False
    commits: dict[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Keys of both halves."""
        return sum(self.counts)

    def header(self) -> dict[str, Any]:
        """As a checkpoint's header has it: two names there are older than those here."""
        return {_HEADER_NAMES.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> CollectionState:
        """The inverse of `header`; what else is there is left."""
        names = {name: _HEADER_NAMES.get(name, name) for name in cls.__dataclass_fields__}
        return cls(**{name: header[key] for name, key in names.items() if key in header})


_HEADER_NAMES = {"documents": "taken", "checks": "looks"}


class Checkpoints:
    """The files of one recipe and set of layers in a folder."""

    def __init__(
        self, where: Path, layers: Sequence[int], recipe: CollectionRecipe, ranks: Ranks
    ) -> None:
        self.where, self.ranks, self.layers = where, ranks, set(layers)
        self._tag, self._recipe, self._setup = _tag(layers, recipe), recipe, recipe.setup

    def save(
        self,
        state: CollectionState,
        tally: KeyTally,
        moments: Mapping[tuple[int, int], Moment],
    ) -> bool:
        """Write this rank's file; when all have, drop the older ones, else these. A full disk is a
        warning: the run goes on. Returns whether all have."""
        tensors = {
            f"{half}.{layer}.{k}": v
            for (half, layer), m in moments.items()
            for k, v in m.state_dict().items()
        }
        path, written = self._file(state.windows, self.ranks.rank, self.ranks.size), True
        try:
            header = {**state.header(), **asdict(tally), "setup": self._setup}
            store.write(path, tensors, header)
        except StatisticsError as error:
            written = False
            logger.warning("no checkpoint: %s", error)
        if complete := all(self.ranks.gather(written)):
            for windows, rank, size in self._visible():
                if windows < state.windows:
                    self._file(windows, rank, size).unlink(missing_ok=True)
        else:
            path.unlink(missing_ok=True)
        return complete

    def load(self) -> tuple[CollectionState, KeyTally | None, MomentStates] | None:
        """What this rank goes on from (a rank that starts from zero: only the state), or None.

        Raises:
            StatisticsError: a file is damaged.
        """
        visible = self.ranks.gather(self._visible())
        for windows, size in sorted({(w, s) for w, _, s in set().union(*visible)}, reverse=True):
            if size == self.ranks.size and all(
                (windows, rank, size) in seen for rank, seen in enumerate(visible)
            ):
                found = self._read([(windows, self.ranks.rank, size)])
                self._keep_only(windows, size)
                return found
            if all((windows, rank, size) in visible[0] for rank in range(size)):
                mine = (
                    self._read([(windows, r, size) for r in range(size)])
                    if self.ranks.rank == 0
                    else None
                )
                state = self.ranks.gather(mine[0] if mine else None)[0]
                assert state is not None  # rank 0 has read it
                self._keep_only(windows, size)
                return mine or (state, None, {})
        # out of the way, or files of another run could complete their set
        for file in self._visible():
            path = self._file(*file)
            logger.warning(
                "starting from zero: %s is there, but not those of all %d ranks, which it takes",
                path,
                file[2],
            )
            with suppress(FileNotFoundError):  # another rank was faster
                path.rename(path.with_name(path.name + INCOMPLETE))
        return None

    def _keep_only(self, windows: int, size: int) -> None:
        """Delete the files of all other sets: one that was never completed could be completed by
        files of another run.
        """
        for file in self._visible():
            if (file[0], file[2]) != (windows, size):
                self._file(*file).unlink(missing_ok=True)

    def drop(self) -> None:
        """When the result is written: delete all files, and those of the same recipe for other sets
        of layers with one of these in it; another recipe's are another run's.
        """
        self.ranks.gather(None)
        for windows, rank, size in self._visible():
            self._file(windows, rank, size).unlink(missing_ok=True)
        for path in self.where.glob(f"checkpoint-{self._tag}.*{INCOMPLETE}"):
            path.unlink(missing_ok=True)
        for path in self.where.glob("checkpoint-*.safetensors") if self.ranks.rank == 0 else ():
            inside = _layers_in(path)
            if inside & self.layers and _is_of(path, inside, self._recipe):
                path.unlink(missing_ok=True)

    def _read(
        self, files: Sequence[tuple[int, int, int]]
    ) -> tuple[CollectionState, KeyTally, MomentStates]:
        """The sum of some ranks' files."""
        state: CollectionState | None = None
        tally: KeyTally | None = None
        total: MomentStates = {}
        for file in files:
            header, tensors = store.read(self._file(*file))
            if header.get("setup", "") not in ("", self._setup):
                raise StatisticsError(
                    f"{self._file(*file)} is of the same weights with another configuration or "
                    "tokenizer; remove it, or collect into another folder"
                )
            part = KeyTally(header["norms"], header["padded"], header["text"])
            state = CollectionState.from_header(header)
            tally = tally.add(part) if tally else part
            for name, tensor in tensors.items():
                half, layer, kind = name.split(".")
                sums = total.setdefault((int(half), int(layer)), {})
                sums[kind] = sums[kind] + tensor if kind in sums and kind != "pending" else tensor
        assert state is not None and tally is not None
        return state, tally, total

    def _file(self, windows: int, rank: int, size: int) -> Path:
        return self.where / f"checkpoint-{self._tag}.{windows:08d}.{rank}-of-{size}.safetensors"

    def _visible(self) -> set[tuple[int, int, int]]:
        pattern = re.compile(rf"checkpoint-{self._tag}\.(\d+)\.(\d+)-of-(\d+)\.safetensors")
        found = (
            pattern.fullmatch(path.name) for path in self.where.glob(f"checkpoint-{self._tag}.*")
        )
        return {(int(m[1]), int(m[2]), int(m[3])) for m in found if m}


def resumable_layers(
    where: Path, layers: Sequence[int], missing: Sequence[int], recipe: CollectionRecipe
) -> list[int]:
    """The layers to collect when `missing` of `layers` are: with those that an earlier run
    collected together with them, if it ended while it wrote its results and left its checkpoint."""
    for path in sorted(where.glob("checkpoint-*.safetensors")):
        inside = _layers_in(path)
        if _is_of(path, inside, recipe) and set(missing) <= inside <= set(layers):
            return sorted(inside)
    return list(missing)


def _is_of(path: Path, layers: set[int], recipe: CollectionRecipe) -> bool:
    """Whether a checkpoint with these layers is of this recipe."""
    return path.name.startswith(f"checkpoint-{_tag(sorted(layers), recipe)}.")


def _tag(layers: Sequence[int], recipe: CollectionRecipe) -> str:
    what = json.dumps([list(layers), recipe.record], sort_keys=True)
    return hashlib.blake2b(what.encode(), digest_size=6).hexdigest()


def _layers_in(path: Path) -> set[int]:
    """Whose sums a checkpoint holds; none where it is damaged."""
    damaged = suppress(StatisticsError, IndexError, ValueError)
    with damaged, opened(path, StatisticsError) as file:
        return {int(name.split(".")[1]) for name in file.names}
    return set()
