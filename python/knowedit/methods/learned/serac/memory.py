"""`MemoryEdit`: facts kept beside the model. No weight changes; questions in their scope are
answered by another model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from knowedit.edits.edit import Edit, check_origin
from knowedit.edits.report import EditReport
from knowedit.errors import EditError
from knowedit.facts.fact import Fact
from knowedit.methods.learned.serac.network import SeracNetwork, in_view
from knowedit.models.editable import EditableModel

FORMAT = "knowedit-memory/2"
EARLIER = ("knowedit-memory/1",)


class MemoryEdit(Edit):
    """Stored facts with the embeddings of their prompts, and the network that decides and answers.

    Applied, it is part of the model's `router`, which `score`, `next_logprobs` and `generate` ask.
    Whatever runs the transformers model itself sees the unedited one. What would change or read
    weights raises EditError.

    Attributes:
        network: with which it was made; saved with the edit.
        embeddings: `[facts, size]` float32.
    """

    format: ClassVar[str] = FORMAT
    earlier: ClassVar[tuple[str, ...]] = EARLIER

    def __init__(
        self,
        network: SeracNetwork,
        embeddings: Tensor,
        facts: Sequence[Fact],
        report: EditReport,
        method_name: str = "SERAC",
        **recorded: Any,
    ) -> None:
        super().__init__(method_name, {}, list(facts), network.fingerprint, report, **recorded)
        self.network, self.embeddings = network, embeddings

    @cached_property
    def key(self) -> str:
        """A name made from the method, the facts and the network's bits."""
        digest = hashlib.blake2b(digest_size=8)
        digest.update(json.dumps([[fact.text, fact.target] for fact in self.facts]).encode())
        digest.update(self.network.bits())
        return f"{self.method_name}-{digest.hexdigest()}"

    def by_parameter(self, model: EditableModel) -> NoReturn:
        raise EditError(
            f"a {self.method_name} edit changes no weight: it cannot be merged, exported or "
            "written into a copy of the model; apply it to the model in memory, or save the edit "
            "itself"
        )

    def delta(self, at: int | str, model: EditableModel | None = None) -> NoReturn:
        raise EditError(f"a {self.method_name} edit changes no weight, so it has no delta")

    def is_applied(self, model: EditableModel) -> bool:
        return isinstance(model.router, Memory) and self.key in model.router.edits

    def apply(self, model: EditableModel) -> None:
        """Remember the facts.

        Raises:
            EditError: already applied, of another model, made with another network than the edits
                applied before, or the model's weights are edited.
        """
        self.check(model)
        memory = model.router if isinstance(model.router, Memory) else Memory(model)
        if self.is_applied(model):
            raise EditError(
                f"this {self.method_name} edit is already applied to {model.name}; undo it first"
            )
        refuse_edited_weights(model)
        if memory.edits and memory.network.bits() != self.network.bits():
            raise EditError(
                "edits of different SERAC networks cannot be applied together; undo the others "
                "first"
            )
        memory.edits[self.key] = self
        model.router = memory.changed()

    def undo(self, model: EditableModel) -> None:
        """Forget the facts; edits may be undone in any order. Raises EditError when it is not
        applied to this model.
        """
        memory = model.router
        if not isinstance(memory, Memory) or not self.is_applied(model):
            raise EditError(f"this {self.method_name} edit is not applied to {model.name}")
        del memory.edits[self.key]
        model.router = memory.changed() if memory.edits else None

    # -- on disk ---------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """As `Edit.record`, with the network's header."""
        return {**super().record(), "network": self.network.header()}

    def tensors(self) -> dict[str, Tensor]:
        """The network's, and the embeddings."""
        return self.network.tensors() | {"embeddings": self.embeddings}

    @classmethod
    def migrate(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """A file of the first version has all that is needed."""
        return dict(record)

    @classmethod
    def of(
        cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor], fingerprint: str
    ) -> MemoryEdit:
        """From `record()` and `tensors()`."""
        check_origin(record, fingerprint)
        recorded = ("config", "software", "statistics", "setup")
        return cls(
            SeracNetwork.of(record["network"], tensors),
            tensors["embeddings"],
            [Fact.from_dict(fact) for fact in record["facts"]],
            EditReport.from_dict(record["report"]),
            record["method"],
            **{name: record[name] for name in recorded if name in record},
        )


@dataclass
class Memory:
    """All memory edits in force on one model, in the order they were applied: its router."""

    model: EditableModel
    edits: dict[str, MemoryEdit] = field(default_factory=dict)
    _stored: tuple[Tensor, list[Fact]] | None = None

    @property
    def network(self) -> SeracNetwork:
        return next(iter(self.edits.values())).network.to(self.model.device)

    def changed(self) -> Memory:
        self._stored = None
        return self

    def route(self, prompts: Sequence[str]) -> list[str | None]:
        """What to ask the counterfactual model instead of each prompt; None: out of scope, the base
        answers.

        One encoding a prompt and one matrix product. Where facts are equally close the one applied
        last wins.
        """
        refuse_edited_weights(self.model)
        if self._stored is None:
            newest = list(self.edits.values())[::-1]
            stored = torch.cat([edit.embeddings for edit in newest]).to(self.model.device)
            self._stored = stored, [fact for edit in newest for fact in edit.facts]
        stored, facts = self._stored
        unique = list(dict.fromkeys(prompts))
        above, which = self.network.best(self.network.embed(self.model, unique), stored)
        found = {
            p: facts[i]
            for p, i, inside in zip(unique, which.tolist(), (above > 0).tolist())
            if inside
        }
        return [in_view(found[p].text, found[p].target, p) if p in found else None for p in prompts]

    @contextmanager
    def counterfactual(self) -> Iterator[None]:
        """The model is the counterfactual one within the block."""
        with self.model.virtual(self.network.adapter):
            yield


def refuse_edited_weights(model: EditableModel) -> None:
    """Raise EditError when weights are edited: embeddings, and what the base would say, are of the
    unedited model.
    """
    if model.ledger.active:
        raise EditError(
            "memory edits and edits of weights cannot be in force together: "
            f"undo {', '.join(model.ledger.active)}, or the memory edits"
        )
