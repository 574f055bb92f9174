"""What is imported, and when (unit): start-up is fast because nothing heavy is. Not by time, which
no test can hold.
"""

import importlib
import json
import signal
import subprocess
import sys

import pytest

import knowedit
import knowedit.integrations
import knowedit.methods
from knowedit.errors import Terminated
from knowedit.io.lazy import declared
from knowedit.methods.listing import methods
from knowedit.methods.registry import method_class

HEAVY = ("torch", "transformers", "numpy", "scipy", "pandas", "datasets", "matplotlib", "peft")
COMMANDS = ("--help", "--version", "eval --help", "methods", "datasets", "models")
RUN = f"""
import sys, json, runpy
heavy = {{}}
for command in {COMMANDS!r}:
    sys.argv = ["knowedit", *command.split()]
    try:
        runpy.run_module("knowedit", run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, (command, stop.code)
    heavy[command] = [name for name in {HEAVY!r} if name in sys.modules]
print(json.dumps(heavy))
"""


def loaded(code):
    """The last line that a fresh interpreter prints, as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_package_imports_nothing_heavy():
    code = "import sys, json, knowedit, knowedit.methods; dir(knowedit); repr(knowedit.Fact)\n"
    code += f"print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    assert loaded(code) == []


def test_commands_that_only_say_something_import_nothing_heavy():
    assert loaded(RUN) == {command: [] for command in COMMANDS}  # in one process: one start


@pytest.mark.parametrize(
    "package",
    [knowedit, knowedit.methods, knowedit.integrations],
    ids=lambda package: package.__name__,
)
def test_every_public_name_is_the_one_that_type_checkers_see(package):
    listed = declared(package.__file__)
    assert set(package.__all__) - {"__version__"} == set(listed) and listed
    for name, module in listed.items():
        assert getattr(package, name) is getattr(importlib.import_module(module), name)
    assert set(package.__all__) <= set(dir(package))


def test_every_method_is_a_name_of_the_package():
    ours = {name: listed for name, listed in methods().items() if listed.entry is None}
    wanted = {method_class(name).__name__: listed.module for name, listed in ours.items()}
    assert wanted.items() <= declared(knowedit.methods.__file__).items()


def test_the_public_surface_fits_a_screen():
    assert len(knowedit.__all__) == len(set(knowedit.__all__)) and len(knowedit.__all__) <= 48


def test_a_name_that_there_is_not():
    with pytest.raises(AttributeError, match="'knowedit' has no attribute 'MEMITT'"):
        _ = knowedit.MEMITT
    with pytest.raises(ImportError):
        from knowedit.methods import MEMITT  # noqa: F401


@pytest.mark.parametrize(
    "ends, said",
    [
        # so typer ends where a signal comes while it reads the command line
        (lambda: 130, "interrupted: nothing was written"),
        (lambda: _raised(Terminated("stopped by SIGTERM: start again")), "interrupted: stopped by"),
        (lambda: _raised(KeyboardInterrupt()), "interrupted: nothing was written"),
    ],
    ids=["while parsing", "statistics", "anywhere"],
)
def test_every_interruption_ends_alike(ends, said, monkeypatch, capsys):
    from knowedit.cli import app as cli

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "app", lambda **_: ends())
    with pytest.raises(SystemExit) as end:
        cli.main()
    signal.signal(signal.SIGTERM, before)
    assert end.value.code == 130
    assert capsys.readouterr().err.startswith(said)


def _raised(error):
    raise error
