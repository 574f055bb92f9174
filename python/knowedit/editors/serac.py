"""SERAC (Mitchell et al., 2022): facts in a memory, a trained gate in front of it, the base model for everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from ..facts import Fact, check_facts
from ..history import History
from ..model import EditableModel
from ..statistics import KeyStatistics
from .editor import Editor
from .memory_edit import MemoryEdit
from .serac_network import SeracNetwork


@dataclass(frozen=True)
class SERAC(Editor):
    """Update: none, the fact is stored; what is out of its scope is answered by the unedited model, bit for bit.

    Attributes:
        network: a trained network or its file; None: the one in the cache folder (`knowedit train serac MODEL`).
        threshold: of the scope classifier's logit; None: as calibrated in training.
    """

    network: SeracNetwork | str | Path | None = None
    threshold: float | None = None

    name: ClassVar[str] = "SERAC"

    def compute(
        self, model: EditableModel, facts: Sequence[Fact], statistics: KeyStatistics | None = None,
        *, history: History | None = None, progress: bool = True,
    ) -> MemoryEdit:  # fmt: skip
        """See `Editor.compute`. Raises EditError for a network that is missing or of another model."""
        facts = history.check_new(facts) if history else check_facts(list(facts))
        found = self.network
        network = found if isinstance(found, SeracNetwork) else SeracNetwork.load(found, model)
        network.check(model)
        if self.threshold is not None:
            network = replace(network, threshold=self.threshold)
        report = {"settings": {"layer": network.layer, "threshold": network.threshold}, "warnings": []}
        return MemoryEdit(network, network.embed(model, [fact.text for fact in facts]), facts, report, self.name)
