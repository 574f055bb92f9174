"""The reference of the command line: `python -m knowedit.cli.reference > docs/cli.md`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer.main

from knowedit.cli.app import app
from knowedit.cli.printed import table

HEAD = """# The command line

Made by `python -m knowedit.cli.reference > docs/cli.md`; `knowedit COMMAND --help` says the same.

The same idea has the same name everywhere: `--limit` is "the first so many", `--method`, `--layer`,
`--corpus` and `--set` may be given several times, `--layer 4-8` is a range. `--set` changes a
setting of the method (`--set metric.gain=0.95`) or, where none is named, an option by its name;
`demo`, `geometry` and `study`, which bring their methods along, take both.

`--config FILE` takes the options from a file, by name; the command line wins, and what `--set` says
is added to the file's `set`. It is

- YAML or JSON with options: `{method: memit, set: {metric.gain: 0.95}, limit: 48}`;
- a method's record alone, as `knowedit methods NAME --json` prints it: `{kind: memit, ...}`;
- an edit file, which records how it was made: `knowedit edit --config lyon.edit.safetensors -o
  again.edit.safetensors` computes the same edit again, and says whether its bits are the same;
- for `knowedit eval`, a grid (`methods:` and `grid:`), which is reported as one table.

Results go to standard output, as JSON with `--json`; notes and bars to standard error, none with
`--quiet`. The exit code is 0, 1 for an error that the message explains, 2 for a command line that
cannot be read.
"""


def reference() -> str:
    """The page, as Markdown."""
    return "\n".join([HEAD, table(), *_commands("knowedit", typer.main.get_command(app), None)])


def _commands(path: str, command: Any, parent: Any) -> Iterator[str]:
    context = command.make_context(path, [], parent=parent, resilient_parsing=True)
    if hasattr(command, "commands"):
        for name in sorted(command.commands):
            yield from _commands(f"{path} {name}", command.commands[name], context)
        return
    params = [p for p in command.get_params(context) if "--help" not in p.opts]
    places = [p for p in params if p.param_type_name == "argument"]
    words = [str(p.name).upper() if p.required else f"[{str(p.name).upper()}]" for p in places]
    needed = [f"{p.opts[0]} ..." for p in params if p not in places and p.required]
    yield f"## {path}\n\n```\n{' '.join([path, *words, *needed, '[options]'])}\n```\n"
    yield f"{' '.join((command.help or '').split())}\n"
    if params:
        yield "| | | default |\n|---|---|---|"
        yield from (_line(p, p in places) for p in params)
        yield ""


def _line(param: Any, place: bool) -> str:
    spelled = [str(param.name).upper()] if place else [*param.opts, *param.secondary_opts]
    text = " ".join((param.help or "").split()).replace("|", "\\|")
    return f"| {', '.join(f'`{name}`' for name in spelled)} | {text} | {_default(param)} |"


def _default(param: Any) -> str:
    if isinstance(getattr(param, "show_default", None), str):
        return str(param.show_default)
    if param.required or param.default in (None, [], ()):
        return "needed" if param.required else ""
    values = param.default if isinstance(param.default, (list, tuple)) else [param.default]
    if isinstance(param.default, bool):
        return "yes" if param.default else ""
    return ", ".join(f"`{value}`" for value in values)


if __name__ == "__main__":
    print(reference(), end="")
