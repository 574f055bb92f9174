"""Building and loading the compiled extension: cache, staleness, absence, and the torch path
without it (unit).
"""

import os
import shlex
import shutil
from types import SimpleNamespace

import pytest

from knowedit_kernels import _native
from tests.processes import Forked

PROGRAM = """
import torch
from knowedit_kernels import explain
from knowedit_kernels.moments import SecondMoment
k = torch.arange(12.0).reshape(4, 3)
assert torch.equal(SecondMoment(3).update(k).sum(), k.double().T @ k.double())
print(explain("second_moment_"))
"""


@pytest.fixture
def run(tmp_path):
    """Runs `PROGRAM` in a process of its own, with these variables; returns its exit status and
    what it printed.
    """
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def with_(**environment):
        process = Forked((program,), tmp_path, {**os.environ, **environment})
        return process.wait(120), *process.said()

    return with_


@pytest.fixture
def compiler():
    try:
        _native.compiler()
        _native.torch_dir()
    except _native.NativeBuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def counted(compiler, compiled_kernels, tmp_path_factory):
    """A compiler that counts its calls and gives out the library that was compiled for all tests,
    and the file it counts in.
    """
    folder = tmp_path_factory.mktemp("compiler")
    script, calls = folder / "script", folder / "calls"
    script.write_text(
        '#!/bin/sh\nif [ "$1" = --version ]; then exit; fi\n'
        f"echo called >> {shlex.quote(str(calls))}\n"
        'while [ "$1" != -o ]; do shift; done\n'
        f'exec cp {shlex.quote(str(_native.load().path))} "$2"\n'
    )
    script.chmod(0o755)
    return str(script), calls


def test_built_once_into_the_cache(run, tmp_path, counted):
    command, calls = counted
    cache = tmp_path / "cache"
    status, said, errors = run(KNOWEDIT_CACHE=str(cache), CXX=command)
    assert status == 0 and "torch" not in said.splitlines()[0], said + errors
    (built,) = cache.rglob("*.so")
    changed = built.stat().st_mtime_ns
    assert run(KNOWEDIT_CACHE=str(cache), CXX=command)[0] == 0
    assert built.stat().st_mtime_ns == changed and len(list(cache.rglob("*"))) == 3
    assert calls.read_text() == "called\n"


def test_without_a_compiler_one_warning_and_the_torch_path(run, tmp_path):
    status, said, errors = run(KNOWEDIT_CACHE=str(tmp_path / "cache"), CXX="no-such-compiler")
    assert status == 0 and said.startswith("second_moment_: torch")
    assert (
        errors.count("no compiled CPU kernels") == 1
        and "no-such-compiler is not an executable" in errors
    )


def test_turned_off(run):
    status, said, errors = run(KNOWEDIT_NATIVE="0")
    assert (
        status == 0 and "refused avx2: no compiled kernels: turned off by KNOWEDIT_NATIVE=0" in said
    )
    assert "UserWarning" not in errors


def test_an_older_torch_is_named_and_nothing_is_compiled(tmp_path, monkeypatch):
    torch = tmp_path / "torch"
    (torch / "include" / "torch" / "csrc" / "stable").mkdir(parents=True)
    spec = SimpleNamespace(origin=str(torch / "__init__.py"))
    monkeypatch.setattr(_native.importlib.util, "find_spec", lambda name: spec)
    for version, old in (
        ("2.9.1+cu128", True),
        ("2.10.0", True),
        ("2.11.0", False),
        ("3.0", False),
    ):
        (torch / "version.py").write_text(
            f"from typing import Optional\n__version__ = '{version}'\n"
        )
        if old:
            with pytest.raises(
                _native.NativeBuildError, match=f"2.11 or newer, and this is {version[:6]}"
            ):
                _native.torch_dir()
        else:
            assert _native.torch_dir() == torch


@pytest.mark.usefixtures("compiler")
def test_a_broken_source_is_reported_and_leaves_nothing(tmp_path, monkeypatch):
    sources = tmp_path / "csrc" / "cpu"
    sources.mkdir(parents=True)
    (sources / "broken.cpp").write_text("int main( {")
    monkeypatch.setattr(_native, "source_dir", lambda: tmp_path / "csrc")
    with pytest.raises(_native.NativeBuildError, match="expected"):
        _native.build(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_library_is_named_after_its_sources(tmp_path, monkeypatch):
    shutil.copytree(_native.source_dir(), tmp_path / "csrc")
    monkeypatch.setattr(_native, "source_dir", lambda: tmp_path / "csrc")
    before = _native.library_name()
    with open(tmp_path / "csrc" / "cpu" / "syrk.h", "a") as file:
        file.write("// changed\n")
    assert _native.library_name() != before
