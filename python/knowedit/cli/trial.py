"""`knowedit try`: ask a model with and without an edit, on a page of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from knowedit.cli.commands import App
from knowedit.cli.options import Loading, Model, say
from knowedit.io.progress import kept_on_interrupt

app = App()


@app.command("try")
def try_edit(
    model: Model,
    edits: Annotated[list[Path], typer.Argument(help="Edit files; all are applied together.")],
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
    alone, with both answers, their probabilities and the nearest facts.
    """
    from knowedit.edits.edit import Edit
    from knowedit.evaluation.trial import Trial
    from knowedit.io.tables import Table

    loaded = [Edit.load(path) for path in edits]
    trial = Trial(run.load(model), loaded)
    if prompt or run.as_json:
        asked = [trial.ask(text, chat=chat) for text in prompt or [loaded[0].facts[0].text]]
        rows = [[one["asked"], one["before"]["text"], one["after"]["text"]] for one in asked]
        run.show(asked, lambda: Table(["asked", "unedited", "edited"], rows))
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
