"""Building and loading the compiled extension: cache, staleness, absence, and the torch path
without it (unit).
"""

import shlex
import shutil
import subprocess
import sys

import pytest

from knowedit_kernels import _native

PROGRAM = """
import torch
from knowedit_kernels import explain
from knowedit_kernels.moments import SecondMoment
k = torch.arange(12.0).reshape(4, 3)
assert torch.equal(SecondMoment(3).update(k).sum(), k.double().T @ k.double())
print(explain("second_moment_"))
"""


def run(**environment):
    import os

    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)


@pytest.fixture
def compiler():
    try:
        _native.compiler()
        _native.torch_dir()
    except _native.NativeBuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def hasty(compiler, tmp_path_factory):
    """A compiler that optimises nothing, in half the time."""
    script = tmp_path_factory.mktemp("compiler") / "hasty"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(_native.compiler())} "$@" -O0\n')
    script.chmod(0o755)
    return str(script)


def test_built_once_into_the_cache(tmp_path, hasty):
    first = run(KNOWEDIT_CACHE=str(tmp_path), CXX=hasty)
    assert first.returncode == 0 and "torch" not in first.stdout.splitlines()[0], first
    built = list(tmp_path.rglob("*.so"))
    assert len(built) == 1
    changed = built[0].stat().st_mtime_ns
    assert run(KNOWEDIT_CACHE=str(tmp_path), CXX=hasty).returncode == 0
    assert built[0].stat().st_mtime_ns == changed and len(list(tmp_path.rglob("*"))) == 3


def test_without_a_compiler_one_warning_and_the_torch_path(tmp_path):
    result = run(KNOWEDIT_CACHE=str(tmp_path), CXX="no-such-compiler")
    assert result.returncode == 0 and result.stdout.startswith("second_moment_: torch")
    assert (
        result.stderr.count("no compiled CPU kernels") == 1
        and "no-such-compiler is not an executable" in result.stderr
    )


def test_turned_off():
    result = run(KNOWEDIT_NATIVE="0")
    assert (
        result.returncode == 0
        and "refused avx2: no compiled kernels: turned off by KNOWEDIT_NATIVE=0" in result.stdout
    )
    assert "UserWarning" not in result.stderr


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
