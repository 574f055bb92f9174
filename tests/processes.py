"""Processes for tests that kill them: forks of one server that has torch and transformers already,
which take seconds to import.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.multiprocessing import start_processes

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["transformers.models.llama.modeling_llama", "knowedit.cli.app", "knowedit.statistics"]
)


class Forked:
    """A program in a process of its own, with the methods of `subprocess.Popen` that tests need.

    Args:
        command: ``("FILE.py", *arguments)`` or ``("-m", "MODULE", *arguments)``.
        cwd: its working directory.
        env: its whole environment.
    """

    def __init__(
        self, command: Sequence[str | os.PathLike], cwd: Path, env: Mapping[str, str]
    ) -> None:
        self._said = Path(tempfile.mkdtemp(prefix="forked-"))
        weakref.finalize(self, shutil.rmtree, self._said, ignore_errors=True)
        words = [str(word) for word in command]
        self._process = _CONTEXT.Process(target=_run, args=(words, cwd, dict(env), self._said))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """The exit status, minus a signal's number, or None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As `returncode`."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal unless it has ended."""
        if self.poll() is None and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, once it has ended.

        Raises:
            TimeoutError: it runs on for `timeout` seconds.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise TimeoutError(f"still running after {timeout} seconds: {self.said()}")
        return self.returncode

    def said(self) -> tuple[str, str]:
        """What it has written to its output and to its errors so far."""
        files = [self._said / name for name in ("out", "err")]
        out, err = (file.read_text() if file.exists() else "" for file in files)
        return out, err

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """As `said`, once it has ended."""
        self.wait(timeout)
        return self.said()


def side_by_side(function: Callable[..., None], count: int, *arguments: Any) -> None:
    """Call ``function(number, *arguments)`` in `count` processes at once. Raises what torch raises
    when one fails.
    """
    start_processes(function, arguments, nprocs=count, start_method="forkserver")


def _run(command: list[str], cwd: Path, env: dict[str, str], said: Path) -> None:
    """What the new process does: become `command`."""
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(said / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
