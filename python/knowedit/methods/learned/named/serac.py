"""SERAC (Mitchell et al. 2022): store facts beside the model, behind a trained scope classifier."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from knowedit.edits.history import History
from knowedit.edits.report import EditReport
from knowedit.facts.fact import Fact
from knowedit.io.memory import peak_memory
from knowedit.io.ranges import Finite
from knowedit.methods.learned.method import LearnedMethod
from knowedit.methods.learned.networks import NetworkFile
from knowedit.methods.learned.serac.memory import MemoryEdit, refuse_edited_weights
from knowedit.methods.learned.serac.network import SeracNetwork
from knowedit.models.editable import EditableModel
from knowedit.statistics import KeyStatistics


@dataclass(frozen=True)
class SERAC(LearnedMethod):
    """Update: none, the fact is stored; what is out of its scope is answered by the unedited model,
    bit for bit.

    Attributes:
        network: a trained network or its file; None: the one in the cache folder (`knowedit train
            serac MODEL`).
        threshold: of the scope classifier's logit; None: as calibrated in training.
    """

    network: SeracNetwork | NetworkFile | str | Path | None = None
    threshold: Finite | None = None

    name: ClassVar[str] = "SERAC"
    network_class = SeracNetwork

    def _compute(
        self,
        model: EditableModel,
        facts: list[Fact],
        statistics: KeyStatistics | None,
        history: History | None,
        progress: bool,
    ) -> MemoryEdit:
        """The stored facts. Raises EditError while weights are edited."""
        network = self.network
        assert isinstance(network, SeracNetwork)  # see LearnedMethod.compute
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
