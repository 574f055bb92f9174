"""Commands killed (nothing is cleaned up) before one of their changes of the disk or at any moment,
drawn at random, and on a disk that is full after some number of bytes.

Nothing may be half-written under its final name, and the same command run again must end well, with
the results of a run that nobody killed, and leave nothing of the killed one behind. Each try is a
fork of this process, which has imported everything and computed nothing.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import transformers

from knowedit.cli import app, edit, evaluate, stats, train
from knowedit.edits.edit import Edit
from knowedit.edits.export import folder as folder_module
from knowedit.edits.history import History
from knowedit.errors import KnowEditError
from knowedit.io import tensors as tensors_module
from knowedit.io.files import PART
from knowedit.models.load import fingerprint_of
from knowedit.statistics.files.store import LayerStatistics
from knowedit_kernels import _native
from tests.faults import sequences
from tests.knowedit.cli.examples import FACTS

LOADED = (pyarrow.parquet, transformers, edit, evaluate, stats, train)  # once, before all forks
#: Python's audit events of what changes a disk; "open" does where it is for writing.
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "open"}


@dataclass(frozen=True)
class Command:
    """A command line, run in a folder of its own.

    Attributes:
        words: of the command line.
        makes: the files and folders that it leaves or changes.
        start: where it begins: "plain", or "edited" (with an edited model's folder).
        weight: how often it is drawn; less for what takes long.
    """

    words: str
    makes: tuple[str, ...]
    start: str = "plain"
    weight: float = 1.0

    @property
    def name(self) -> str:
        """How counts call it."""
        return self.words.split()[0]


COMMANDS = (
    Command("apply model a.edit -o out --force", ("out",), weight=3),
    Command("apply model a.edit b.edit -o out --force", ("out",), weight=3),
    Command("undo edited", ("edited",), "edited", 4),
    Command("export model a.edit -o out --force", ("out",), weight=2),
    Command("stats model --layers 1 --corpus corpus.txt --tokens 400 -o out", ("out",), weight=1),
    Command(
        "edit model facts.jsonl -o c.edit --history h --method ft --set layers=[1] --set steps=2 "
        "--force",
        ("c.edit", "h"),
        weight=0.6,
    ),
    Command(
        "eval model facts.jsonl --limit 1 --method ft --set layers=[1] --set steps=2 -o out",
        ("out",),
        weight=0.2,
    ),
)


class Failed(AssertionError):
    """A command that left what it must not, or did not end well the second time."""


class Place:
    """Folders that commands start from, made once.

    Attributes:
        changes: by command, how often it changes the disk.
        seconds: by command, how long it takes.
        ends: by command, what is in the files that it leaves.
    """

    def __init__(self, base: Path) -> None:
        self.base, self.said = base, base / "said"
        self.changes: dict[Command, int] = {}
        self.seconds: dict[Command, float] = {}
        self.ends: dict[Command, Any] = {}
        compiled = _native.cache_root() / "native"
        _native.load()
        (base / "cache").mkdir()
        (base / "cache" / "native").symlink_to(compiled)
        os.environ |= {"KNOWEDIT_CACHE": str(base / "cache"), "HF_HUB_OFFLINE": "1"}
        if self.run(lambda: _make(base / "plain"), base):
            raise Failed(self.said.read_text())
        shutil.copytree(base / "plain", base / "edited")
        if self.run(typed("apply model a.edit b.edit -o edited --force"), base / "edited"):
            raise Failed(self.said.read_text())

    def run(
        self,
        action: Callable[[], object],
        folder: Path,
        *,
        stop: int = 0,
        after: float = 0,
        room: int = 0,
    ) -> int:
        """Run `action` in a fork, in `folder`; its exit status, negative for a signal.

        Args:
            stop: the number of the change of the disk before which it is killed; 0: it is not;
                -1: they are counted, in the file "changes".
            after: seconds after which it is killed; 0: it is not.
            room: bytes that a file can have, as where the disk is full; 0: any number.
        """
        child = os.fork()
        if not child:
            try:
                os.chdir(folder)
                _say_into(self.said)
                if room:
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
                signal.setitimer(signal.ITIMER_REAL, after)  # nobody handles it: the process ends
                _counted(action, stop, self.base)
                os._exit(0)
            except SystemExit as end:
                os._exit(int(end.code or 0))
            except BaseException:
                traceback.print_exc()
                os._exit(70)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def fresh(self, command: Command) -> Path:
        """A folder to run it in, as it is before the first run."""
        folder = self.base / "try"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.base / command.start, folder)
        return folder

    def learn(self, command: Command) -> None:
        """Run it without a kill. Raises Failed where that does not end well."""
        if command in self.ends:
            return
        folder = self.fresh(command)
        begun = time.monotonic()
        if code := self.run(typed(command.words), folder, stop=-1):
            raise Failed(f"{command.words}: exit {code}: {self.said.read_text()[-600:]}")
        self.seconds[command] = time.monotonic() - begun
        self.changes[command] = int((self.base / "changes").read_text())
        self.ends[command] = {name: content(folder / name) for name in command.makes}

    def kill(self, command: Command, chance: random.Random) -> str:
        """Kill it somewhere, then run it again; says what the kill left. Raises Failed."""
        folder = self.fresh(command)
        if chance.random() < 0.6:
            stop = chance.randint(1, self.changes[command])
            where = f"{command.words}, before change {stop} of {self.changes[command]}"
            code = self.run(typed(command.words), folder, stop=stop)
        else:
            after = chance.uniform(0, self.seconds[command])
            where = f"{command.words}, after {after:.4f} s"
            code = self.run(typed(command.words), folder, after=after)
        if code not in (-signal.SIGKILL, -signal.SIGALRM):
            return "over before"
        for name in command.makes:
            whole(folder / name, where)
        return self._again(command, folder, where)

    def fill(self, command: Command, room: int) -> str:
        """Run it on a disk that is full after so many bytes of a file, then again with room; says
        what came of it. Raises Failed.
        """
        folder = self.fresh(command)
        code, said = self.run(typed(command.words), folder, room=room), self.said.read_text()
        where = f"{command.words}, {room} bytes a file"
        if code == 0:
            return "enough room"
        if code != 1 or "Traceback" in said or "error: " not in said:
            raise Failed(f"{where}: exit {code}: {said[-600:]}")
        if "Error; " in said or "unforeseen" in said:
            raise Failed(f"{where}: an error that was not foreseen: {said[-600:]}")
        for name in command.makes:
            whole(folder / name, where)
        self._again(command, folder, where)
        return "refused"

    def _again(self, command: Command, folder: Path, where: str) -> str:
        done = command.name in ("apply", "export", "edit") and all(
            (folder / name).exists() for name in command.makes
        )
        undone = command.name == "undo" and not (folder / "edited" / "knowedit.undo").exists()
        code = self.run(typed(command.words), folder)
        if code and not done and not undone:
            raise Failed(f"{where}: again, exit {code}: {self.said.read_text()[-600:]}")
        for name in command.makes:
            found = content(folder / name)
            if not done and found != self.ends[command][name]:
                raise Failed(f"{where}: {name} differs from that of a run without a kill")
        for path in folder.rglob(".*"):
            if PART.fullmatch(path.name) and not done and not undone:
                raise Failed(f"{where}: {path.relative_to(folder)} is left after the second run")
        return "done before" if done or undone else "made again"


def typed(words: str) -> Callable[[], None]:
    """The command line."""

    def action() -> None:
        sys.argv = ["knowedit", *words.split()]
        app.main()

    return action


def _make(folder: Path) -> None:
    """A folder with a model, two edits, facts and a corpus."""
    from tests.knowedit.edits.test_edit import an_edit

    folder.mkdir()
    model = sequences.model_of("llama", sequences.byte_tokenizer())
    model.hf.save_pretrained(folder / "model")
    model.tokenizer.save_pretrained(folder / "model")
    for seed, name in enumerate("ab"):
        an_edit(model, seed, size=0.01).save(folder / f"{name}.edit")
    (folder / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS[:1]))
    texts = [f"Some text number {i} about nothing at all." for i in range(60)]
    (folder / "corpus.txt").write_text("\n\n".join(texts))


def _say_into(path: Path) -> None:
    out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)


def _counted(action: Callable[[], object], stop: int, base: Path) -> None:
    """Run `action`, killed before change number `stop` of files below `base`."""
    count = 0

    def hook(event: str, given: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in CHANGES or (event == "open" and not _writes(given)):
            return
        if isinstance(given[0], (str, Path)) and str(Path(given[0]).absolute()).startswith(below):
            count += 1
            if count == stop:
                os.kill(os.getpid(), signal.SIGKILL)

    below = f"{base}/try/"
    if stop:
        sys.addaudithook(hook)
    try:
        action()
    finally:
        if stop < 0:
            (base / "changes").write_text(str(count))


def _writes(given: tuple[Any, ...]) -> bool:
    flags = given[2]
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


def whole(path: Path, where: str) -> None:
    """Raise Failed for a file that is there and cannot be read."""
    found = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    for file in found:
        if file.is_dir() or any(part.startswith(".") for part in file.relative_to(path).parts):
            continue
        try:
            _read(file)
        except (KnowEditError, ValueError) as error:
            raise Failed(f"{where}: {file.name} is half-written: {error}") from error


def _read(file: Path) -> None:
    from safetensors.torch import load_file

    if file.name == "knowedit.undo":
        folder_module.read_record(file)
    elif file.suffix == ".edit":
        Edit.load(file)
    elif file.name == "h":
        History.load(file)
    elif file.name.startswith("layer-"):
        LayerStatistics.load(file)
    elif file.suffix == ".safetensors":
        load_file(file)
    elif file.suffix == ".json":
        json.loads(file.read_text("utf-8"))
    elif file.suffix == ".jsonl":
        for line in file.read_text("utf-8").splitlines():
            json.loads(line)


def content(path: Path) -> Any:
    """What must be equal in two runs: a model's fingerprint, the bits of tensors, names of the
    others (which hold times).
    """
    from safetensors.torch import load_file

    if not path.exists():
        return None
    if (path / "config.json").exists():
        names = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
        return fingerprint_of(path), names
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        return [(str(p.relative_to(path)), content(p)) for p in inside]
    if path.suffix in (".safetensors", ".edit") or path.name == "h":
        return {name: tensors_module.checksum(t) for name, t in load_file(path).items()}
    return path.name


def many(count: int, seed: int, folder: Path, until: float) -> dict[str, Any]:
    """So many kills, and a quarter as many full disks; fewer where the monotonic clock passes
    `until`.
    """
    chance, place = random.Random(seed), Place(folder)
    done: Counter[str] = Counter()
    failed: list[str] = []
    kills = fills = 0
    while kills < count and time.monotonic() < until:
        command = chance.choices(COMMANDS, [one.weight for one in COMMANDS])[0]
        try:
            place.learn(command)
            if chance.random() < 0.2:
                fills += 1
                end = place.fill(command, int(10 ** chance.uniform(1, 5.5)))
                done[f"{command.name}, full disk: {end}"] += 1
            else:
                end = place.kill(command, chance)
                kills += end != "over before"
                done[f"{command.name}, killed: {end}"] += 1
        except Failed as problem:
            failed.append(str(problem)[:900])
            kills += 1
            if len(failed) > 50:
                break
    return {"tried": kills, "full disks": fills, "outcomes": done, "failed": failed}
