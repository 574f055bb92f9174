"""Looks at how well a collection has converged: after which windows, and each layer's by another
rank.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from knowedit.errors import StatisticsError
from knowedit.statistics import convergence
from knowedit.statistics.distributed.checkpoints import Place
from knowedit.statistics.distributed.ranks import Ranks
from knowedit.statistics.files.store import Recipe
from knowedit.statistics.memory import spare
from knowedit.statistics.meter import Meter
from knowedit.statistics.sums import Sums

logger = logging.getLogger(__name__)


class Looks:
    """At the two halves of some sums, spread over the ranks."""

    def __init__(self, sums: Sums, recipe: Recipe, ranks: Ranks) -> None:
        self.sums, self.recipe, self.ranks = sums, recipe, ranks
        self._probes: dict[int, Tensor] = {}

    def numbers(self, until: int) -> list[int]:
        """The numbers of windows after which to look, up to the first beyond `until`; rarely when
        nothing hangs on it.
        """
        often = self.recipe.until != "tokens"
        looks = [2 if often else 8]
        while looks[-1] <= until:
            looks.append(
                max(looks[-1] + 1, int(looks[-1] * convergence.GROWTH)) if often else 4 * looks[-1]
            )
        return looks

    def following(self, windows: int) -> int:
        """The first of them after so many windows."""
        return self.numbers(windows)[-1]

    def due(self, place: Place) -> bool:
        """Whether to look now; when nothing hangs on it only during the first half, for there is
        one more look at the end.
        """
        early = self.recipe.until != "tokens" or 2 * place.count <= self.recipe.tokens
        return early and place.windows in self.numbers(place.windows)

    def last(self, place: Place, meter: Meter) -> None:
        """Look at the end, unless the last look was at all tokens that are here."""
        looks = next(iter(place.looks.values()), [])
        if not looks or looks[-1]["tokens"] != place.count:
            self.look(place, meter)

    def look(self, place: Place, meter: Meter) -> None:
        """Estimate the error of each layer, where there are enough tokens and memory; into `place`,
        which may be converged.
        """
        model, layers, recipe = self.sums.model, self.sums.layers, self.recipe
        if not convergence.enough(place.counts, model.d_ff):
            return
        if not all(self.ranks.gather(self._room())):
            logger.warning(
                "no estimate after %d tokens: too little memory for it beside the sums", place.count
            )
            return
        self._probes = self._probes or convergence.probe_keys(model, layers)
        mine: dict[int, dict[str, convergence.Error]] = {}
        for start in range(
            0, len(layers), self.ranks.size
        ):  # a layer for each rank, then all of them compute
            own = self._added(
                layers[start : start + self.ranks.size], place.windows // self.ranks.size
            )
            for layer, sums in own.items():
                try:
                    wide = recipe.until == "converged"
                    mine[layer] = convergence.compare(
                        sums, place.counts, self._probes[layer], null_space=wide
                    )
                except StatisticsError as error:
                    logger.info("layer %d: no estimate yet: %s", layer, error)
        found = {
            layer: errors for part in self.ranks.gather(mine) for layer, errors in part.items()
        }
        for layer in found:
            place.looks.setdefault(str(layer), []).append(
                convergence.record(place.count, found, layer)
            )
        measures = {"tokens": (), "solve": ("solve",), "converged": ("solve", "null_space")}[
            recipe.until
        ]
        if recipe.tolerance is not None and len(found) == len(layers):
            place.converged = all(
                convergence.worst(found, measure) <= recipe.tolerance for measure in measures
            )
        shown = ("solve", "null_space") if recipe.until == "converged" else ("solve",)
        meter.looked(
            {measure: convergence.worst(found, measure) for measure in shown} if found else {}
        )

    def _added(self, layers: Sequence[int], turn: int) -> dict[int, list[Tensor]]:
        """The halves of one of the layers, added up over all ranks; each rank has another layer, or
        none.
        """
        own: dict[int, list[Tensor]] = {}
        for number, layer in enumerate(
            layers, turn
        ):  # in turns, for where there are fewer layers than ranks
            owner = number % self.ranks.size
            sums = [self.ranks.add(self.sums.moment(half, layer).sum(), owner) for half in (0, 1)]
            if owner == self.ranks.rank:
                own[layer] = sums
        return own

    def _room(self) -> bool:
        """Whether this rank can estimate: both halves' sums, and the factor and workspace of one of
        them.
        """
        model = self.sums.model
        return (
            min(spare(model.weight(layer).device) for layer in self.sums.layers)
            > 6 * 8 * model.d_ff**2
        )
