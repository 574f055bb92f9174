"""`knowedit session`: facts that arrive, are corrected and are forgotten day by day, in a folder.

The folder says which model, method and statistics it was begun with, so that every later command
names the folder alone. No command changes the model's own files: `knowedit apply MODEL FOLDER -o
OUT` writes what stands into a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knowedit.cli.commands import App
from knowedit.cli.edit import Allow, Facts, Force, OneMethod, edit_lines, facts_named, run_record
from knowedit.cli.options import (
    AGAIN,
    GO_ON,
    STATISTICS,
    DeviceMap,
    Limit,
    Model,
    Output,
    Strict,
    command_line,
    one,
    placed,
    say,
)
from knowedit.errors import KnowEditError
from knowedit.io.files import check_free, locked
from knowedit.io.lines import number_of
from knowedit.io.progress import kept_on_interrupt
from knowedit.io.tables import Table
from knowedit.models.tokens import join

if TYPE_CHECKING:
    from knowedit.edits.edit import Edit
    from knowedit.facts.fact import Fact
    from knowedit.methods.session import Session

app = App(help="Facts written, corrected and forgotten day after day, kept in a folder.")

New = Annotated[Path, typer.Argument(help="The folder to begin.")]
Kept = Annotated[Path, typer.Argument(help="A folder of `knowedit session open`.")]


@dataclass(frozen=True)
class Opening(Output):
    """What every command takes that changes a session."""

    model: Annotated[
        str | None,
        typer.Option("--model", help="A hub id or a folder.", show_default="what it was begun on"),
    ] = None
    device_map: DeviceMap = None

    @contextmanager
    def session(self, folder: Path, allow: list[str] | None = None) -> Iterator[Session]:
        """The session of `folder`, with its model and statistics; the lock is held meanwhile.

        Raises:
            KnowEditError: the folder does not say on which model it was begun; or as
                `Session.open`.
        """
        from knowedit.edits.journal import Journal
        from knowedit.edits.limits import Limits
        from knowedit.methods.base import statistics_for
        from knowedit.methods.registry import make_method
        from knowedit.methods.session import Session
        from knowedit.models.load import load_model

        journal, limits = Journal(folder), Limits().with_settings(allow or [])
        begun, method = journal.run, make_method(journal.method)
        if self.model is None and "model" not in begun:
            raise KnowEditError(
                f"{folder} was begun in Python and does not say on which model; give --model"
            )
        model = load_model(
            self.model or begun["model"],
            dtype=begun.get("dtype", "auto"),
            device_map=placed(self.device_map),
            dequantise=begun.get("dequantise", False),
            say=say,
        )
        journal.check(model)
        where = begun.get("statistics")
        with kept_on_interrupt(lambda: f"{folder} is as it was; {AGAIN}"):
            statistics = statistics_for(
                [method],
                model,
                one(begun.get("corpus")),
                begun.get("tokens"),
                None if where is None else Path(where),
                begun.get("seed", 0),
                begun.get("pinned"),
            )
            with Session.open(folder, model, method, statistics, limits=limits) as session:
                yield session


@dataclass(frozen=True)
class Writing(Opening):
    """And every one that commits an edit."""

    limit: Limit = None
    strict: Strict = False
    allow: Allow = None
    force: Force = False

    def commit(self, folder: Path, facts: str, how: str, **options: Any) -> None:
        """Let the session's method `how` make an edit of `facts`, and show what is said then."""
        from knowedit.evaluation.interview import Interview, said_table

        wanted = facts_named(facts, self.limit, self.strict)
        with self.session(folder, self.allow) as session:
            earlier, asked = session.history.facts, Interview(session.model, wanted)
            made: Edit = getattr(session, how)(wanted, force=self.force, **options)
            said, standing = asked.hear(), session.history.facts
        again = [f for f in made.facts if f in earlier]
        gone = [f for f in earlier if f not in standing]
        record = {
            "folder": str(folder),
            "key": made.key,
            "written": made.written,
            "facts": _dicts(made.facts),
            "taken_out": _dicts(gone),
            "written_again": _dicts(again),
            "standing": len(standing),
            "report": made.report.to_dict(),
            "said": [one.to_dict() for one in said],
        }
        lines = edit_lines(made)
        lines += [f"  taken out: {join(fact.text, fact.new_answer)}" for fact in gone]
        lines += [f"  written again, of one value with it: {fact.text}" for fact in again]
        what = "forgotten" if how == "forget" else "new"
        lines += [f"\n{said_table(said, len(wanted), what)}\n"]
        lines += [f"{folder}: {_stand(len(standing))}"]
        self.show(record, lambda: "\n".join(lines))


def _dicts(facts: list[Fact]) -> list[dict[str, Any]]:
    return [fact.to_dict() for fact in facts]


def _anywhere(begun: dict[str, Any]) -> dict[str, Any]:
    """What a session was begun with, its paths so that they hold in any working folder."""

    def whole(value: Any) -> Any:
        if isinstance(value, list):
            return [whole(one) for one in value]
        there = isinstance(value, str) and Path(value).exists()
        return str(Path(value).resolve()) if there else value

    return {name: whole(value) for name, value in begun.items()}


@app.command("open")
def begin(folder: New, model: Model, *, run: OneMethod) -> None:
    """Begin a session of a model: the folder records the method with its settings, the model, and
    which statistics they are, which are collected now if they are not in the cache. Later commands
    use the same ones, whatever has become of the text.
    """
    from knowedit.edits.journal import Journal
    from knowedit.methods.base import statistics_for

    if len(run.method) != 1:
        raise KnowEditError("a session writes with one method; give --method once")
    check_free(folder)
    method = run.methods()[0].with_corpus(one(run.corpus))
    editable = run.load(model)
    with kept_on_interrupt(lambda: f"{folder} was not begun; {STATISTICS}; {GO_ON}"):
        # settings that do not fit the model are refused here, too
        statistics = statistics_for(
            [method], editable, one(run.corpus), run.tokens, run.statistics, run.seed or 0
        )
    with locked(folder):
        check_free(folder)  # another run may have been faster
        begun = _anywhere(run_record(model, run))
        begun |= {} if statistics is None else {"pinned": statistics.identity}
        Journal.begin(folder, editable.fingerprint, method.to_dict(), begun)
    record = {"folder": str(folder), "model": model, "fingerprint": editable.fingerprint}
    record["method"] = method.kind
    to_write = command_line("session", "apply", folder, "FACTS")
    run.show(record, lambda: f"began {folder} for {editable.name}; write with: {to_write}")


@app.command("apply")
def write(
    folder: Kept,
    facts: Facts,
    correct: Annotated[
        bool, typer.Option("--correct", help="Facts that contradict earlier ones take their place.")
    ] = False,
    *,
    run: Writing,
) -> None:
    """Write facts after those that stand, as one edit; a fact that contradicts one of them is
    refused.
    """
    run.commit(folder, facts, "write", correct=correct)


@app.command("correct")
def correct(folder: Kept, facts: Facts, *, run: Writing) -> None:
    """Write facts in place of what stands of the same prompts and subjects: the old values are
    taken out exactly.
    """
    run.commit(folder, facts, "correct")


@app.command("forget")
def forget(
    folder: Kept,
    facts: Facts,
    answer: Annotated[
        str | None,
        typer.Option(help="What to say instead; default: what the model says without them."),
    ] = None,
    *,
    run: Writing,
) -> None:
    """Take facts out as if they had never been written; they are named by their prompts and
    subjects.
    """
    run.commit(folder, facts, "forget", answer=answer)


@app.command("list")
def stands(folder: Kept, *, output: Output) -> None:
    """The facts that stand, in the order of writing, with the moment and the edit. No model is
    loaded.
    """
    from knowedit.edits.journal import Journal

    journal = Journal(folder)
    history = journal.read()
    places = history.standing()
    record = {
        "folder": str(folder),
        "model": journal.run.get("model"),
        "fingerprint": journal.fingerprint,
        "method": journal.method,
        "edits": [edit.key for edit in history.edits],
        "facts": [
            {"written": p.edit.written, "edit": p.edit.key, **p.fact.to_dict()} for p in places
        ],
    }
    rows = [[p.edit.written, p.edit.key, p.fact.text, p.fact.target] for p in places]
    note = (
        f"{_stand(len(places))}, of {number_of(len(history), 'edit')} of {journal.method['kind']}"
    )
    table = Table(["written (UTC)", "edit", "prompt", "says"], rows, notes=[note])
    output.show(record, lambda: table)


@app.command()
def compact(
    folder: Kept,
    keep: Annotated[int, typer.Option(min=0, help="Leave the last so many edits alone.")] = 0,
    *,
    run: Opening,
) -> None:
    """Merge all but the last edits into one: what they cost no longer grows, and what is merged
    cannot be taken back one by one any more.
    """
    with run.session(folder) as session:
        before = len(session.history)
        session.compact(keep)
        left, standing = len(session.history), len(session.history.facts)
    run.show(
        {"folder": str(folder), "edits": left, "standing": standing},
        lambda: f"{folder}: {number_of(before, 'edit')} before, {left} now; {_stand(standing)}",
    )


@app.command("rollback")
def roll_back(
    folder: Kept,
    until: Annotated[str, typer.Argument(help="A day or a moment (UTC), as in 2026-03-01.")],
    *,
    run: Opening,
) -> None:
    """Take back every edit that was committed after the end of a day, or after a moment: the
    weights are bit for bit what they were. The edits are put into the folder's `undone`.
    """
    with run.session(folder) as session:
        undone = session.roll_back(until)
        standing = len(session.history.facts)
    run.show(
        {
            "folder": str(folder),
            "until": until,
            "undone": [edit.key for edit in undone],
            "standing": standing,
        },
        lambda: f"{folder}: {number_of(len(undone), 'edit')} taken back; {_stand(standing)}",
    )


def _stand(count: int) -> str:
    """`1 fact stands`, `2 facts stand`."""
    return f"{number_of(count, 'fact')} stand{'s' * (count == 1)}"
