"""From where on an edit is refused: it does not write what it should, or it ruins the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowedit.errors import EditError, RuinousEditError
from knowedit.io.config import Config

if TYPE_CHECKING:
    from knowedit.edits.report import EditReport

RUINOUS = "RUINOUS"  # how the warnings of such an edit begin
REMEDY = (
    "write fewer facts at once, choose another layer (--layer), lower the clamp or raise the "
    "weight of what should stay"
)


@dataclass(frozen=True)
class Limits(Config):
    """What an edit may do, by what was measured on the edited model.

    Attributes:
        gain: least mean share of the planned change that is realised at the facts' own prompts.
        relative_norm: largest |change| / |weight| of a layer.
        kl: largest mean KL(before || edited) of the next token of ordinary text, nats.
        same: least share of places in ordinary text with the same most likely next token.
        perplexity: largest ratio of the perplexity of ordinary text to that before.
        said: least share of the facts that the edited model says at their own prompts. The usual 0
            asks for none: whether a fact is said is a figure of the report.
    """

    gain: float = 0.5
    relative_norm: float = 10.0
    kl: float = 0.3
    same: float = 0.7
    perplexity: float = 1.1
    said: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.perplexity >= 1 and self.kl >= 0 and self.relative_norm > 0):
            raise EditError(
                f"limits.perplexity is a ratio of 1 or more, kl 0 or more and relative_norm "
                f"positive: {self.perplexity}, {self.kl}, {self.relative_norm}"
            )
        if not 0 <= self.said <= 1:
            raise EditError(f"limits.said is a share between 0 and 1: {self.said}")

    def broken(self, report: EditReport, earlier: Sequence[EditReport] = ()) -> list[str]:
        """What passes the limits, each with its figures; nothing for an edit that was not measured.

        Args:
            earlier: reports of the edits before it in a sequence, which together may not raise the
                perplexity by more than the limit either.
        """
        found = [
            f"layer {layer} changes by {norm:.1f} times its own norm (limit {self.relative_norm:g})"
            for layer, norm in report.relative_norm.items()
            if not norm <= self.relative_norm
        ]
        measured = report.measured
        if measured is None:
            unknown = f"nobody measured whether its facts are said (limit {self.said:.0%})"
            return [*found, unknown] if self.said > 0 else found
        said = sum(measured.exact) / max(len(measured.exact), 1)
        if not said >= self.said:
            found.append(
                f"{sum(measured.exact)} of {len(measured.exact)} facts are said at their own "
                f"prompts (limit {self.said:.0%})"
            )
        gain = measured.mean_gain
        if gain is not None and not gain >= self.gain:
            found.append(
                f"the edited model realises {gain:.0%} of the planned change at the facts' own "
                f"prompts (limit {self.gain:.0%})"
            )
        before = [other.measured.perplexity_ratio for other in earlier if other.measured]
        start = measured.perplexity_before / math.prod(before)  # of this edit's texts
        if not measured.perplexity <= self.perplexity * start:
            found.append(
                f"the perplexity of ordinary text goes from {start:.2f} to "
                f"{measured.perplexity:.2f} (limit {self.perplexity - 1:+.0%})"
            )
        if not measured.kl <= self.kl:
            found.append(
                f"the next words of ordinary text move by a KL of {measured.kl:.2f} nats "
                f"(limit {self.kl:g})"
            )
        if not measured.same >= self.same:
            found.append(
                f"only {measured.same:.0%} of the next words of ordinary text stay the most likely "
                f"(limit {self.same:.0%})"
            )
        return found

    def check(self, report: EditReport, earlier: Sequence[EditReport] = ()) -> None:
        """Raise RuinousEditError, with figures and the remedy, for an edit beyond the limits."""
        if found := self.broken(report, earlier):
            raise RuinousEditError(
                f"this edit is refused: {'; '.join(found)}. Better: {REMEDY}; or write it all the "
                "same with force=True (--force)"
            )
