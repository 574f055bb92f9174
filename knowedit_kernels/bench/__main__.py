"""Command line of the benchmark: an operation, or compare, roofline, explain."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from knowedit_kernels import _gate
from knowedit_kernels.bench import (
    grouped,
    jvp,
    lowrank,
    machine,
    moments,
    results,
    roofline,
    runner,
    solver,
    target_loss,
)
from knowedit_kernels.bench.problem import DTYPES, Operation

OPERATIONS: dict[str, Operation] = {
    "moments": moments.OPERATION,
    "grouped": grouped.OPERATION,
    "lowrank": lowrank.OPERATION,
    "solver": solver.OPERATION,
    "target_loss": target_loss.OPERATION,
    "jvp": jvp.OPERATION,
}


def _list(kind: type, choices: Sequence[str]) -> Any:
    def parse(text: str) -> list[Any]:
        items = [kind(item) for item in text.split(",")]
        if wrong := [
            item
            for item in items
            if (choices and item not in choices) or (kind is int and item < 1)
        ]:
            raise argparse.ArgumentTypeError(
                f"{wrong[0]!r} is not {'one of ' + ', '.join(choices) if choices else 'positive'}"
            )
        return items

    parse.__name__ = f"comma-separated {kind.__name__}"  # argparse quotes it in its message
    return parse


def _positive(text: str) -> int:
    return _list(int, ())(text)[0]


def _add_parameters(parser: argparse.ArgumentParser, operation: Operation) -> None:
    for name, parameter in operation.parameters.items():
        kind = type(parameter.cpu[0])
        on_cpu, on_gpu = (",".join(map(str, values)) for values in (parameter.cpu, parameter.cuda))
        defaults = f"{on_cpu} on a CPU, {on_gpu} on a GPU"
        listed = _list(kind, parameter.choices)
        parser.add_argument(
            f"--{name}", type=listed, metavar="LIST", help=f"{parameter.help} ({defaults})"
        )
    parser.add_argument("--device", help="default: cuda if there is one")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m knowedit_kernels.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, operation in OPERATIONS.items():
        known = "; ".join(
            f"{key}: {provider.about}" for key, provider in operation.providers.items()
        )
        sub = commands.add_parser(
            name, help=operation.about, epilog=f"Providers. {known}".replace("%", "%%")
        )
        _add_parameters(sub, operation)
        sub.add_argument(
            "--providers", type=_list(str, ()), default=["ours", "torch", "rome"], metavar="LIST"
        )
        sub.add_argument(
            "--baseline", default="torch", help="the provider that speed-ups are relative to"
        )
        sub.add_argument("--rounds", type=_positive, default=9)
        checked = "grade against float64; without, no speed-up"
        sub.add_argument(
            "--check", action=argparse.BooleanOptionalAction, default=True, help=checked
        )
        sub.add_argument(
            "--energy",
            type=float,
            default=5.0,
            metavar="SECONDS",
            help="window per row for NVML; 0: off",
        )
        sub.add_argument("--json", type=Path, metavar="FILE", help="write JSON lines")
    sub = commands.add_parser("compare", help="two JSON files; exit code 1 if the second is worse")
    sub.add_argument("before", type=Path)
    sub.add_argument("after", type=Path)
    sub.add_argument(
        "--tolerance", type=float, default=1.1, help="how much more time is still the same"
    )
    sub = commands.add_parser("roofline", help="a picture of a JSON file")
    sub.add_argument("input", type=Path)
    sub.add_argument("-o", "--output", type=Path, default=Path("roofline.svg"))
    sub = commands.add_parser(
        "explain", help="which implementation would run, and why not the others"
    )
    explained = sub.add_subparsers(dest="operation", required=True)
    for name, operation in OPERATIONS.items():
        _add_parameters(explained.add_parser(name, help=operation.about), operation)
    return parser


def _device(arguments: argparse.Namespace) -> torch.device:
    return torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _problems(
    operation: Operation, arguments: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    """Every combination of the listed values."""
    columns = []
    for name, parameter in operation.parameters.items():
        given = getattr(arguments, name)
        columns.append(
            given
            if given is not None
            else (parameter.cuda if device.type == "cuda" else parameter.cpu)
        )
    return [dict(zip(operation.parameters, values)) for values in itertools.product(*columns)]


def _bench(arguments: argparse.Namespace) -> int:
    operation, device = OPERATIONS[arguments.command], _device(arguments)
    settings = runner.Settings(device, arguments.rounds, arguments.check, arguments.baseline)
    problems = _problems(operation, arguments, device)
    names = {
        "fp64" if values.get("precision") == "fp64" else values.get("dtype", "fp64")
        for values in problems
    }
    dtypes = [dtype for name, dtype in DTYPES.items() if name in names]
    environment = machine.environment(device, dtypes)
    ceilings = environment["ceilings"]
    meter = machine.EnergyMeter(device, arguments.energy)
    print(results.format_environment(environment))
    rows: list[runner.Row] = []
    for values in problems:
        found = runner.measure(
            arguments.command, operation, values, arguments.providers, settings, ceilings, meter
        )
        rows += found
        print(f"\n{arguments.command} {results.describe(values)}", results.HEADINGS, sep="\n")
        print(*map(results.format_row, found), sep="\n")
        print(*(f"ours ran as {row['implementation']}" for row in found if "implementation" in row))
        if arguments.json:
            results.write(
                arguments.json, environment, rows
            )  # after every problem, so an interrupted run keeps its rows
    red = [row for row in rows if row["red"]]
    if red:
        print(
            f"\n{len(red)} of {len(rows)} rows failed or are over their accuracy budget",
            file=sys.stderr,
        )
    return 1 if red else 0


def _explain(arguments: argparse.Namespace) -> int:
    operation, device = OPERATIONS[arguments.operation], _device(arguments)
    for values in _problems(operation, arguments, device):
        print(results.describe(values))
        print(operation.decide(operation.make(values, device)))
    for (gate, where), failure in _gate.verdicts().items():
        print(f"accuracy gate {gate} on {where}: {failure or 'passed'}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code (1: a row failed or is over budget; 2: bad usage)."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "compare":
            before, after = (results.read(path)[1] for path in (arguments.before, arguments.after))
            lines, worse = results.compare(before, after, arguments.tolerance)
            print(*lines, sep="\n")
            return 1 if worse else 0
        if arguments.command == "roofline":
            roofline.draw(*results.read(arguments.input), arguments.output)
            return 0
    except results.ResultsError as error:
        print(error, file=sys.stderr)
        return 2
    return _explain(arguments) if arguments.command == "explain" else _bench(arguments)


if __name__ == "__main__":
    sys.exit(main())
