"""`knowedit try`: ask a model with and without an edit, on a page of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from knowedit.cli.commands import App
from knowedit.cli.options import Loading, Model, say
from knowedit.errors import KnowEditError
from knowedit.io.progress import kept_on_interrupt

app = App()


@app.command("try")
def try_edit(
    model: Model,
    edits: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Edit files, the history of a sequence, or a session's folder; all are applied "
            "together. None, with --prompt: ask the model as it is."
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of this machine; default: a free one.")
    ] = 0,
    open_page: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in the browser.")
    ] = True,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Ask this and end, without a page; repeatable."),
    ] = None,
    chat: Annotated[bool, typer.Option(help="Ask --prompt in the chat template.")] = False,
    *,
    run: Loading,
) -> None:
    """Ask a model with and without an edit: a small page in the browser, served to this machine
    alone, with both answers, their probabilities and the nearest facts. With --prompt and no edit:
    ask the model as it is.
    """
    from knowedit.edits.journal import edits_in
    from knowedit.evaluation.trial import Trial
    from knowedit.io.tables import Table

    loaded = [edit for path in edits or () for edit in edits_in(path)]
    if not loaded and not prompt:
        raise KnowEditError("nothing to try: name an edit, or ask the model as it is with --prompt")
    trial = Trial(run.load(model), loaded)
    if prompt or run.as_json:
        typed = prompt or [loaded[0].facts[0].text]
        asked = [trial.ask(text, chat=chat) for text in typed]
        heads = ["asked", "unedited", "edited"] if loaded else ["asked", "said"]
        rows = [
            [text, one["before"]["text"], one["after"]["text"]] for text, one in zip(typed, asked)
        ]
        run.show(asked, lambda: Table(heads, [row[: len(heads)] for row in rows]))
        return
    from knowedit.report.trial import Server

    with (
        Server(trial, port) as server,
        kept_on_interrupt(lambda: "the page is closed; no file was written"),
    ):
        say(f"open {server.address} in a browser; Ctrl-C ends it")
        if open_page:
            import webbrowser

            webbrowser.open(server.address)
        server.serve_forever()
