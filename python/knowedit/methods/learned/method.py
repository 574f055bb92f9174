"""What the methods with a trained network have in common: which, and how it is recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from knowedit.edits.edit import Edit
from knowedit.edits.history import History
from knowedit.facts.fact import Fact
from knowedit.methods.base import Method
from knowedit.methods.learned.networks import TrainedNetwork
from knowedit.models.editable import EditableModel
from knowedit.statistics import KeyStatistics


class LearnedMethod(Method, abstract=True):
    """Attributes:
    network: a trained network, its file, or None: the one in the cache folder. The edit's record
        names it by file and digest; one that is only in memory, by digest.
    network_class: of the network.
    """

    network: Any
    network_class: ClassVar[type[TrainedNetwork]]

    def compute(
        self,
        model: EditableModel,
        facts: Sequence[Fact],
        statistics: KeyStatistics | None = None,
        *,
        history: History | None = None,
        progress: bool = True,
    ) -> Edit:
        """As `Method.compute`; there are no keys, so a history's facts are only checked, and
        statistics not used.

        Raises:
            EditError: also for a network that is missing, not trained or of another model.
        """
        network = self.network
        if not isinstance(network, TrainedNetwork):
            network = self.network_class.load(network, model)
        network.check(model)
        known = self.with_settings(network=network)
        with model.evaluating():
            return super(LearnedMethod, known).compute(
                model, facts, statistics, history=history, progress=progress
            )
