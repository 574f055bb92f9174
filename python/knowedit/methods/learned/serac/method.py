"""SERAC (Mitchell et al., 2022): facts in a memory, a trained gate in front of it, the base model
for everything else.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from knowedit.edits.history import History
from knowedit.edits.report import EditReport
from knowedit.facts.fact import Fact
from knowedit.io.memory import peak_memory
from knowedit.methods.base import Method
from knowedit.methods.learned.serac.memory import MemoryEdit, refuse_edited_weights
from knowedit.methods.learned.serac.network import SeracNetwork
from knowedit.models.editable import EditableModel
from knowedit.statistics import KeyStatistics


@dataclass(frozen=True)
class SERAC(Method):
    """Update: none, the fact is stored; what is out of its scope is answered by the unedited model,
    bit for bit.

    Attributes:
        network: a trained network or its file; None: the one in the cache folder (`knowedit train
            serac MODEL`).
        threshold: of the scope classifier's logit; None: as calibrated in training.
    """

    network: SeracNetwork | str | Path | None = None
    threshold: float | None = None

    name: ClassVar[str] = "SERAC"

    def _compute(
        self,
        model: EditableModel,
        facts: list[Fact],
        statistics: KeyStatistics | None,
        history: History | None,
        progress: bool,
    ) -> MemoryEdit:
        """As `Method.compute`; there are no keys, so a history's facts are only checked, and
        statistics not used.

        Raises:
            EditError: also for a network that is missing, not trained or of another model, and
                while weights are edited.
        """
        found = self.network
        network = found if isinstance(found, SeracNetwork) else SeracNetwork.load(found, model)
        network.check(model)
        if self.threshold is not None:
            network = replace(network, threshold=self.threshold)
        refuse_edited_weights(model)
        start = time.perf_counter()
        with peak_memory(model.device) as peak:
            embeddings = network.embed(model, [fact.text for fact in facts])
            memory = peak()
        report = EditReport(
            seconds=time.perf_counter() - start,
            details={
                "settings": {"layer": network.layer, "threshold": network.threshold},
                "peak_memory_bytes": memory,
                "trainable_parameters": network.report["trainable_parameters"],
            },
        )
        return MemoryEdit(network, embeddings, facts, report, self.name)
