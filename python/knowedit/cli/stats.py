"""`knowedit stats`: collect key statistics, and look after the files they are in.

`knowedit stats MODEL ...` collects; the other commands of the group have names (ls, show, verify,
export, import, clean).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knowedit.cli.commands import App, Group
from knowedit.cli.generated import SETTINGS, command
from knowedit.cli.options import Layers, Loading, Model, Output, Run, hush, one, parse_layers, say
from knowedit.errors import StatisticsError
from knowedit.io.lines import named
from knowedit.io.tables import Column, Table

if TYPE_CHECKING:
    from knowedit.models.editable import EditableModel
    from knowedit.statistics.files.verify import Finding


class _Group(Group):
    """A first word that names no command is the model of `collect`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["collect", *args]
        return super().parse_args(ctx, args)


app = App(
    cls=_Group,
    help="Key statistics. `knowedit stats MODEL` collects them (see `knowedit stats collect "
    "--help`); under torchrun on many GPUs.",
)

Where = Annotated[Path, typer.Argument(help="A statistics file or a folder of them.")]


@app.command(
    cls=command("knowedit.statistics.collect:CollectSettings", without=("progress", "as_json"))
)
def collect(
    ctx: typer.Context,
    model: Model,
    corpus: Annotated[
        list[str],
        typer.Option(
            help="A .txt/.jsonl/.parquet(.gz) file, 'wikipedia', 'hf:owner/name' or 'self'; "
            "repeatable, with weights ('wiki.txt*3') to mix."
        ),
    ] = ["wikipedia"],  # noqa: B006
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Keys to sum; default: 64 for each of a key's dimensions; with --until the "
            "most, 640."
        ),
    ] = None,
    until: Annotated[
        str,
        typer.Option(
            help="tokens; solve: until C^-1 k is known to the tolerance (ROME, MEMIT); "
            "converged: the null space too (AlphaEdit)."
        ),
    ] = "tokens",
    tolerance: Annotated[float, typer.Option(help="Relative error at which --until stops.")] = 0.3,
    layers: Layers = None,
    experts: Annotated[
        str, typer.Option(help="Of layers with experts: those routed to, the shared one, or both.")
    ] = "routed",
    max_length: Annotated[
        int, typer.Option(help="Longer documents are cut into pieces of this many tokens.")
    ] = 512,
    first_tokens: Annotated[
        bool, typer.Option(help="Count each piece's first token too (an outlier; not advised).")
    ] = False,
    precision: Annotated[
        str, typer.Option(help="Of the sums: exact, or what knowedit_kernels.SecondMoment offers.")
    ] = "exact",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder (default: the cache).")
    ] = None,
    *,
    run: Run,
) -> None:
    """Collect: all layers in one partial pass, checkpointed; run again to go on after an
    interruption.
    """
    from knowedit.io.ranks import started
    from knowedit.models.calibration import sinks_of
    from knowedit.statistics import key_statistics
    from knowedit.statistics.memory import keep_few_compiled_shapes

    keep_few_compiled_shapes()
    with started() as ranks:
        hush(run.quiet or ranks.rank > 0)
        found = key_statistics(
            editable := run.load(model).editing(experts),  # type: ignore[arg-type]
            parse_layers(layers),
            one(corpus),
            tokens,
            until=until,
            tolerance=tolerance,
            max_length=max_length,
            skip_first=not first_tokens,
            seed=run.seed or 0,
            precision=precision,
            directory=output,
            as_json=run.as_json,
            **ctx.meta[SETTINGS],
        )
    if ranks.rank > 0:
        return
    sinks = sinks_of(editable)
    rows = [
        {
            "layer": layer,
            "module": found[layer].module,
            "tokens": found[layer].count,
            "trace": found[layer].energy,
            "first_token_ratio": found[layer].first_ratio,
            "sink": sinks.at(layer),
            **found[layer].extra,
        }
        for layer in found.layers
    ]
    run.show(rows, lambda: _collected(rows))


def _collected(rows: list[dict[str, Any]]) -> Table:
    """What was collected, a row a layer."""
    columns = [
        Column("layer"),
        Column("tokens", ","),
        Column("tr C", ".4g"),
        Column("first/other", ".2f"),
        Column("error", ".1e"),
        Column("padding", ".1%"),
        Column("C^-1 k", align="right"),
        Column(""),
    ]
    cells = [
        (
            row["layer"],
            row["tokens"],
            row["trace"],
            row["first_token_ratio"],
            row["audit"]["normwise"],
            row["padding"],
            _estimate(row["convergence"]),
            "attention sink: refused by the methods" if row["sink"] else "",
        )
        for row in rows
    ]
    return Table(columns, cells).without_empty_columns()


@app.command()
def ls(
    where: Annotated[Path | None, typer.Argument(help="A folder (default: the cache).")] = None,
    *,
    output: Output,
) -> None:
    """List the statistics on this machine: model, layers, tokens, corpus. Damaged files are named
    at the end, with the exit status 1.
    """
    from knowedit.io.files import cache_dir
    from knowedit.statistics.files import store

    folder = where or cache_dir("statistics")
    groups: dict[Path, list[dict[str, Any]]] = {}
    damaged: list[str] = []
    files = store.files(folder)
    for path in files:
        try:
            found = _in_brief(path)
        except StatisticsError:
            damaged.append(str(path))
        else:
            groups.setdefault(path.parent, []).append(found)
    rows = [
        {
            "folder": str(place),
            "model": layers[0]["model"],
            "fingerprint": layers[0]["fingerprint"],
            "layers": [one["layer"] for one in layers],
            "tokens": layers[0]["tokens"],
            "corpus": layers[0]["corpus"],
            "bytes": sum(one["bytes"] for one in layers),
        }
        for place, layers in groups.items()
    ]
    nothing = f"no statistics in {folder}; collect some with: knowedit stats MODEL"
    output.show(rows, lambda: "\n".join(map(_listed, rows)) or nothing)
    if damaged:
        raise StatisticsError(
            f"{len(damaged)} of {len(files)} files cannot be read: {', '.join(damaged)}; "
            f"`knowedit stats verify {folder}` says why; {store.REMEDY}"
        )


def _in_brief(path: Path) -> dict[str, Any]:
    """What a file's header says of it. Raises StatisticsError: it is damaged."""
    from knowedit.io.tensors import understood
    from knowedit.statistics.files import store

    with understood(path, "a statistics file", StatisticsError, store.REMEDY):
        head = store.header(path)
        return {
            "model": str(head["model"]),
            "fingerprint": str(head["recipe"]["fingerprint"]),
            "layer": int(head["layer"]),
            "tokens": int(head["count"]),
            "corpus": str(head["recipe"]["corpus"]["name"]),
            "bytes": path.stat().st_size,
        }


def _listed(row: dict[str, Any]) -> str:
    return (
        f"{row['model']}  {named('layer', row['layers'])}  {row['tokens']:,} tokens of "
        f"{row['corpus']}  {row['bytes'] / 1e6:.0f} MB\n  {row['folder']}"
    )


@app.command()
def show(
    where: Where,
    plot: Annotated[
        Path | None,
        typer.Option(help="Also draw errors and spectrum into this .png, .svg or .pdf."),
    ] = None,
    *,
    output: Output,
) -> None:
    """Say all that a file's header records, and how well it has converged."""
    from knowedit.cli.inspection import describe
    from knowedit.statistics import KeyStatistics
    from knowedit.statistics.files import store

    found, files = KeyStatistics.load(where), _files(where)
    output.show(
        [store.header(path) for path in files],
        lambda: "\n\n".join(describe(file).text for file in files),
    )
    if plot is not None:
        from knowedit.report import plots

        plots.save(plots.statistics(found), plot)
        say(f"drawn into {plot}")


@app.command()
def verify(
    where: Annotated[
        Path, typer.Argument(help="A file of ours, a folder of them, or a peer's .npz.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Also check that it belongs to this model.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Of an .npz whose name does not say.")] = None,
    *,
    loading: Loading,
) -> None:
    """Check symmetry, positivity, counts and accumulation error, and with --model that the keys are
    that model's.
    """
    from knowedit.statistics.files import npz, verify

    editable = loading.load(model) if model else None
    report: dict[str, list[verify.Finding]] = {}
    for path in [where] if where.suffix == ".npz" else _files(where):
        if path.suffix == ".npz":
            peer = npz.read(path)
            findings = verify.plausible(peer.total, peer.count)
            if editable is not None:
                at = npz.layer_of(peer.module, editable) if layer is None else layer
                if at is None:
                    raise StatisticsError(
                        f"{path}: of {peer.module}, which {editable.name} does not have; pass "
                        f"--layer"
                    )
                findings.append(
                    verify.resembles(peer.total, peer.count, verify.sample(editable, at))
                )
        else:
            findings = _checked(path, editable)
        report[str(path)] = findings
    loading.show(
        {name: verify.as_json(findings) for name, findings in report.items()},
        lambda: "\n".join(line for file in report.items() for line in _verified(*file)),
    )
    if bad := [
        name for name, findings in report.items() if not all(finding.ok for finding in findings)
    ]:
        raise StatisticsError(
            f"{len(bad)} of {len(report)} files failed: {', '.join(bad)}; collect them again"
        )


def _checked(path: Path, editable: EditableModel | None) -> list[Finding]:
    """What is to be said of a file of ours; one that cannot be read is a finding, too."""
    from knowedit.statistics.files import verify
    from knowedit.statistics.files.store import LayerStatistics

    try:
        found = LayerStatistics.load(path)
    except StatisticsError as error:
        return [verify.Finding("readable", False, str(error))]
    return [*verify.sound(found), *(verify.belongs(found, editable) if editable else [])]


def _verified(name: str, findings: Sequence[Finding]) -> list[str]:
    marks = [(finding, "ok  " if finding.ok else "FAIL") for finding in findings]
    return [name, *(f"  {mark} {found.name:22} {found.detail}" for found, mark in marks)]


@app.command()
def export(
    where: Where,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The peer's folder of statistics (`stats_dir`).")
    ],
    style: Annotated[
        str, typer.Option("--format", help="rome, memit, easyedit or alphaedit: whose names.")
    ] = "rome",
    dataset: Annotated[str, typer.Option(help="The peer's `mom2_dataset`.")] = "wikipedia",
    sample_size: Annotated[
        int, typer.Option(help="The peer's `mom2_n_samples`: it ignores files with another.")
    ] = 100_000,
    *,
    shown: Output,
) -> None:
    """Write .npz files that ROME, MEMIT, EasyEdit or AlphaEdit find and read."""
    from knowedit.statistics.files import npz
    from knowedit.statistics.files.store import LayerStatistics

    written: list[dict[str, Any]] = []
    for path in _files(where):
        found = LayerStatistics.load(path)
        file = npz.write(output, found, style, dataset=dataset, sample_size=sample_size)
        written.append({"from": str(path), "file": str(file), "layer": found.layer})
    shown.show(written, lambda: "\n".join(one["file"] for one in written))


@app.command("import")
def take(
    model: Model,
    files: Annotated[list[Path], typer.Argument(help="A peer's .npz files.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder (default: the cache).")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Where the file's name does not say.")] = None,
    *,
    loading: Loading,
) -> None:
    """Take over .npz files of ROME, MEMIT, EasyEdit or AlphaEdit, if they are this model's."""
    from knowedit.statistics.files import npz, store

    editable, taken = loading.load(model), []
    for path in files:
        made, _ = npz.import_layer(path, editable, layer)
        target = store.layer_file(output or store.folder(editable.name, made.recipe), made.layer)
        if target.exists():
            raise StatisticsError(f"{target} exists; choose another folder")
        made.save(target)
        taken.append(
            {"from": str(path), "file": str(target), "layer": made.layer, "tokens": made.count}
        )
    loading.show(
        taken,
        lambda: "\n".join(
            f"{t['from']} -> {t['file']}: layer {t['layer']}, {t['tokens']:,} tokens" for t in taken
        ),
    )


@app.command()
def clean(
    keep: Annotated[
        float, typer.Option(help="Gigabytes to keep, most recently used first.", min=0)
    ] = 0.0,
    *,
    output: Output,
) -> None:
    """Delete cached tokens of corpora (statistics stay): collecting from the same corpus again
    tokenises it again.
    """
    from knowedit.io.files import cache_dir, trim

    folder = cache_dir("tokens")
    deleted = trim(folder, int(keep * 1e9))
    output.show(
        {"folder": str(folder), "deleted": deleted},
        lambda: f"{folder}: {deleted:,} bytes of tokens deleted",
    )


def _files(where: Path) -> list[Path]:
    from knowedit.statistics.files import store

    if not (found := store.files(where)):
        raise StatisticsError(
            f"{where}: no statistics files here; collect them with `knowedit stats`"
        )
    return found


def _estimate(looks: list[dict[str, Any]]) -> str:
    return f"±{looks[-1]['solve'][0]:.1%}" if looks else "-"
