"""What is imported, and when (unit): start-up is fast because nothing heavy is. Not by time, which
no test can hold.
"""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import knowedit
import knowedit.methods

HEAVY = ("torch", "transformers", "numpy", "scipy", "pandas", "datasets", "matplotlib", "peft")
RUN = (
    "import sys, json, runpy\n"
    "sys.argv = ['knowedit', *{arguments!r}]\n"
    "try:\n"
    "    runpy.run_module('knowedit', run_name='__main__')\n"
    "except SystemExit as stop:\n"
    "    assert not stop.code, stop.code\n"
    "print(json.dumps([m for m in {heavy!r} if m in sys.modules]))\n"
)


def loaded(code):
    """The last line that a fresh interpreter prints, as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_package_imports_nothing_heavy():
    code = "import sys, json, knowedit, knowedit.methods; dir(knowedit); repr(knowedit.Fact)\n"
    code += f"print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    assert loaded(code) == []


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["eval", "--help"], ["methods"], ["datasets"], ["models"]],
    ids=" ".join,
)
def test_commands_that_only_say_something_import_nothing_heavy(arguments):
    assert loaded(RUN.format(arguments=arguments, heavy=HEAVY)) == []


@pytest.mark.parametrize("package", [knowedit, knowedit.methods], ids=lambda p: p.__name__)
def test_every_public_name_is_there_and_has_its_type(package):
    """`__all__`, the table that loads, and the imports that type checkers read are the same."""
    seen = {}
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    (checked,) = [n for n in tree.body if isinstance(n, ast.If)]
    for node in checked.body:
        seen |= {alias.asname: (node.module, alias.name) for alias in node.names}
    listed = {name: module for module, names in package.MODULES.items() for name in names}
    assert {name: module for name, (module, _) in seen.items()} == listed
    assert all(name == original for name, (_, original) in seen.items())
    assert set(package.__all__) - {"__version__"} == set(listed)
    for name, module in listed.items():
        assert getattr(package, name) is getattr(importlib.import_module(module), name)
    assert set(package.__all__) <= set(dir(package))


def test_the_public_surface_fits_a_screen():
    assert len(knowedit.__all__) == len(set(knowedit.__all__)) and len(knowedit.__all__) <= 48


def test_a_name_that_there_is_not():
    with pytest.raises(AttributeError, match="'knowedit' has no attribute 'MEMITT'"):
        _ = knowedit.MEMITT
    with pytest.raises(ImportError):
        from knowedit.methods import MEMITT  # noqa: F401
