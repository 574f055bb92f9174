"""Commands stopped by a signal before one of their changes of the disk or at any moment, drawn at
random, and on a disk that is full.

Nothing may be half-written under its final name, and the same command run again must end well, with
the results of a run that nobody stopped, and leave nothing of the stopped one behind. Each try is a
fork of this process, which has imported everything and computed nothing.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from safetensors.torch import load_file

from knowedit.cli import app
from knowedit.edits.edit import Edit
from knowedit.edits.export import folder as folder_module
from knowedit.edits.history import History
from knowedit.edits.journal import ABOUT, Journal
from knowedit.errors import KnowEditError
from knowedit.facts.records import read_facts, write_facts
from knowedit.io import tensors as tensors_module
from knowedit.io.files import PART, size_of
from knowedit.methods.registry import make_method
from knowedit.methods.session import Session
from knowedit.models.load import fingerprint_of, load_model
from knowedit.statistics.files.store import LayerStatistics
from knowedit_kernels import _native
from tests.faults import sequences
from tests.faults.tally import Tally
from tests.knowedit.cli.examples import FACTS

#: Python's audit events of what changes a disk; "open" does where it is for writing. Flushing,
#: which has no event, is counted too: what it flushes is written, and not yet in its place.
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "open"}
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
INTERRUPTED, UNFORESEEN = 130, 70  # exit codes
DISK = 64  # MiB of the disk that is filled, where one can be mounted
FT = "--method ft --set layers=[1] --set steps=2"


@dataclass(frozen=True)
class Command:
    """A command line, run in a folder of its own.

    Attributes:
        words: of the command line; "session" alone is a program that keeps one.
        makes: the files and folders that it leaves or changes.
        start: where it begins: "plain", "edited" (with an edited model's folder), "measured" (with
            a folder of results) or "kept" (with a session's folder).
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

    def run(self) -> None:
        """Run it here."""
        if self.words == "session":
            keep_session()
        else:
            sys.argv = ["knowedit", *self.words.split()]
            app.main()


COMMANDS = (
    Command("apply model a.edit -o out --force", ("out",), weight=2),
    Command("apply model a.edit b.edit -o out --force", ("out",)),
    Command("apply model a.edit b.edit -o out --force --stream", ("out",), weight=3),
    Command("undo edited", ("edited",), "edited", 4),
    Command("undo edited --edit OTHER", ("edited",), "edited", 4),
    Command("export model a.edit -o out --force", ("out",)),
    Command(
        "export model a.edit -o out.gguf --format gguf-lora --force", ("out.gguf",), weight=0.5
    ),
    Command(
        "stats collect model --layer 1 --corpus corpus.txt --tokens 400 -o out", ("out",), weight=2
    ),
    Command(
        f"edit model facts.jsonl -o c.edit --history h {FT} --force", ("c.edit", "h"), weight=0.7
    ),
    Command(f"eval model --dataset facts.jsonl {FT} -o out", ("out",), weight=0.5),
    Command("train serac model --dataset people.jsonl --steps 2 -o net", ("net",), weight=0.4),
    Command("train mend model --dataset people.jsonl --steps 2 -o net", ("net",), weight=0.3),
    Command("report run", ("run",), "measured", 0.5),
    Command("session", ("kept",), weight=2),
    Command("session compact kept --model model", ("kept",), "kept", 2),
)


def keep_session() -> None:
    """Two facts written into a session that is kept in a folder, as a service does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    method = make_method({**make_method("ft").to_dict(), "layers": [1], "steps": 2})
    try:
        with contextlib.closing(Session.open("kept", load_model("model"), method)) as session:
            for fact in read_facts("two.jsonl"):
                if not session.history.find([fact]):
                    session.write([fact], force=True, progress=False)
    except (KnowEditError, OSError) as error:
        print(f"error: {error}")
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        print("interrupted: ")
        raise SystemExit(INTERRUPTED) from None


class Failed(AssertionError):
    """A command that left what it must not, or did not end well the second time."""


@dataclass(frozen=True)
class End:
    """How a fork ended: its exit status, negative for a signal; what it said; seconds of processor
    time.
    """

    code: int
    said: str
    seconds: float

    @property
    def last(self) -> str:
        """Of what it said, what belongs into a message."""
        return self.said[-600:]


class Place:
    """Folders that commands start from, made once.

    Attributes:
        changes: by command, how often it changes the disk.
        seconds: by command, processor time that it takes.
        room: by command, bytes of what it makes.
        ends: by command, what is in the files that it leaves.
    """

    def __init__(self, base: Path, *, is_disk: bool = False) -> None:
        self.base, self.is_disk = base, is_disk
        self.changes: dict[Command, int] = {}
        self.seconds: dict[Command, float] = {}
        self.room: dict[Command, int] = {}
        self.ends: dict[Command, Any] = {}
        torch.set_num_threads(1)
        compiled = _native.cache_root() / "native"
        _native.load()
        (base / "cache").mkdir()
        (base / "cache" / "native").symlink_to(compiled)
        os.environ |= {"KNOWEDIT_CACHE": str(base / "cache"), "HF_HUB_OFFLINE": "1"}
        self._must(self.run(lambda: _make(base / "plain"), base, stop=-1))
        self._heard()
        for start, words in (
            ("edited", "apply model a.edit b.edit -o edited --force"),
            ("measured", f"eval model --dataset facts.jsonl {FT} -o run"),
            ("kept", "session"),
        ):
            shutil.copytree(base / "plain", base / start)
            self._must(self.run(Command(words, ()).run, base / start, stop=-1))
            self._heard()

    def _heard(self) -> int:
        """Import what the last fork imported, and say how often it changed the disk."""
        count, *modules = (self.base / "changes").read_text().split()
        _import(modules)
        return int(count)

    def _must(self, end: End) -> End:
        if end.code:
            raise Failed(f"exit {end.code}: {end.last}")
        return end

    def run(
        self,
        action: Callable[[], object],
        folder: Path,
        *,
        stop: int = 0,
        after: float = 0,
        by: signal.Signals = signal.SIGKILL,
        limit: int | None = None,
    ) -> End:
        """Run `action` in a fork, in `folder`.

        Args:
            stop: the number of the change of the disk before which it is stopped; 0: it is not;
                -1: they are counted, in the file "changes", beside the names of what was imported.
            after: seconds of its processor time after which it is stopped; 0: it is not.
            by: the signal that stops it.
            limit: bytes that a file can have; None: any number.
        """
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            code = UNFORESEEN
            try:
                os.chdir(folder)
                os.dup2(writing, 1)
                os.dup2(writing, 2)
                os.close(reading)
                os.close(writing)
                if limit is not None:  # Python ignores SIGXFSZ: writes fail
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                if (
                    by != signal.SIGKILL
                ):  # else the timer's own signal, which nobody handles, ends it
                    signal.signal(signal.SIGPROF, lambda *_: os.kill(os.getpid(), by))
                signal.setitimer(signal.ITIMER_PROF, after)
                _counted(action, stop, by, self.base)
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            except KeyboardInterrupt:  # before the command was there to catch it
                print("interrupted: at once")
                code = INTERRUPTED
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(BaseException):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        os.close(writing)
        with open(reading, encoding="utf-8", errors="replace") as pipe:
            said = pipe.read()
        _, status, used = os.wait4(child, 0)
        return End(os.waitstatus_to_exitcode(status), said, used.ru_utime + used.ru_stime)

    def fresh(self, command: Command) -> Path:
        """A folder to run it in, as it is before the first run."""
        folder = self.base / "try"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.base / command.start, folder)
        return folder

    def learn(self, command: Command) -> None:
        """Run it undisturbed, twice: what it imports is imported here before the second time.
        Raises Failed where it does not end well, or ends in two ways.
        """
        if command in self.ends:
            return
        for _ in range(2):
            folder = self.fresh(command)
            end = self._must(self.run(command.run, folder, stop=-1))
            self.seconds[command] = end.seconds
            self.room[command] = sum(size_of(folder / name) for name in command.makes)
            self.changes[command] = self._heard()
            found = {name: content(folder / name) for name in command.makes}
            if self.ends.setdefault(command, found) != found:
                raise Failed(f"{command.words}: two runs differ")

    def kill(self, command: Command, chance: random.Random) -> str:
        """Stop it somewhere, then run it again; says what came of it. Raises Failed."""
        folder, by = self.fresh(command), chance.choice(SIGNALS)
        if chance.random() < 0.6:
            stop = chance.randint(1, self.changes[command])
            where = f"{by.name} before change {stop} of {self.changes[command]}"
            end = self.run(command.run, folder, stop=stop, by=by)
        else:
            after = chance.uniform(0, self.seconds[command])
            where = f"{by.name} after {after:.4f} s"
            end = self.run(command.run, folder, after=after, by=by)
        where = f"{command.words}, {where}"
        if end.code == 0:
            return f"{by.name}: over before"
        if end.code not in (-by, -signal.SIGPROF, INTERRUPTED) or (
            end.code == INTERRUPTED and ("interrupted: " not in end.said or "Traceback" in end.said)
        ):
            raise Failed(f"{where}: exit {end.code}: {end.last}")
        return f"{by.name}: {self._again(command, folder, where)}"

    def fill(self, command: Command, chance: random.Random) -> str:
        """Run it on a full disk, or where no file can have more than some bytes, then again with
        room; says what came of it. Raises Failed.
        """
        folder = self.fresh(command)
        if self.is_disk and chance.random() < 0.5:
            room = int(chance.uniform(0, 1.1 * self.room[command]))
            where, kind = f"{command.words}, {room} bytes left", "full disk"
            with _ballast(self.base / "ballast", room):
                end = self.run(command.run, folder)
        else:
            room = int(10 ** chance.uniform(0, 5.3))
            where, kind = f"{command.words}, {room} bytes a file", "small files"
            end = self.run(command.run, folder, limit=room)
        if end.code == 0:
            return f"{kind}: enough room"
        if end.code != 1 or "Traceback" in end.said or "error: " not in end.said:
            raise Failed(f"{where}: exit {end.code}: {end.last}")
        if "not foreseen" in end.said:
            raise Failed(f"{where}: an error that was not foreseen: {end.last}")
        return f"{kind}: refused, {self._again(command, folder, where)}"

    def _again(self, command: Command, folder: Path, where: str) -> str:
        for name in command.makes:
            whole(folder / name, where)
        wanted = self.ends[command]
        done = all(content(folder / name) == wanted[name] for name in command.makes)
        end = self.run(command.run, folder)
        if end.code and not (done and end.code == 1 and "error: " in end.said):
            raise Failed(f"{where}: again, exit {end.code}: {end.last}")
        for name in command.makes:
            if content(folder / name) != wanted[name]:
                raise Failed(f"{where}: {name} differs from that of an undisturbed run")
        if not end.code:
            for path in folder.rglob(".*"):
                if PART.fullmatch(path.name):
                    raise Failed(f"{where}: {path.relative_to(folder)} is left by the second run")
        return "done before" if done else "made again"


def _import(modules: list[str]) -> None:
    """What a fork has imported, for the next ones: imports would take most of their time."""
    for name in sorted(set(modules) - set(sys.modules)):
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # forks share what their collector does not touch


@contextlib.contextmanager
def _ballast(path: Path, room: int) -> Iterator[None]:
    """A file that leaves so many bytes of its disk free."""
    free = os.statvfs(path.parent)
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_frsize - room))
    try:
        yield
    finally:
        path.unlink()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[tuple[Path, bool]]:
    """A folder that is a disk of its own, and whether it is: who may not mount one gets a plain
    folder.
    """
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(disk)]
    try:
        mounted = not subprocess.run(command, capture_output=True).returncode
    except OSError:
        mounted = False
    try:
        yield disk, mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


def _make(folder: Path) -> None:
    """A folder with a model, two edits, facts and a corpus."""
    from tests.knowedit.edits.test_edit import an_edit
    from tests.knowedit.methods.trained import PEOPLE

    folder.mkdir()
    model = sequences.model_of("llama", sequences.byte_tokenizer())
    model.hf.save_pretrained(folder / "model")
    model.tokenizer.save_pretrained(folder / "model")
    an_edit(model, 0, size=0.01).save(folder / "a.edit")
    other = an_edit(model, 1, size=0.01)
    other.method_name = "OTHER"
    other.save(folder / "b.edit")
    for name, facts in (("facts", FACTS[:1]), ("two", FACTS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    write_facts(folder / "people.jsonl", PEOPLE)
    texts = [f"Some text number {i} about nothing at all." for i in range(60)]
    (folder / "corpus.txt").write_text("\n\n".join(texts))


def _counted(action: Callable[[], object], stop: int, by: signal.Signals, base: Path) -> None:
    """Run `action`, stopped before change number `stop` of files below `base`."""
    count, below, flush = 0, f"{base}/try/", os.fsync

    def one() -> None:
        nonlocal count
        count += 1
        if count == stop:
            os.kill(os.getpid(), by)

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event not in CHANGES or (event == "open" and not _writes(given)):
            return
        if isinstance(given[0], (str, Path)) and str(Path(given[0]).absolute()).startswith(below):
            one()

    def flushed(file: int) -> None:
        one()
        flush(file)

    if stop:
        sys.addaudithook(hook)
        os.fsync = flushed
    try:
        action()
    finally:
        if stop < 0:
            (base / "changes").write_text("\n".join([str(count), *sys.modules]))


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
    if file.name == "knowedit.undo":
        folder_module.read_record(file)
    elif file.suffix == ".edit":
        Edit.load(file)
    elif file.name == "h":
        History.load(file)
    elif file.name == ABOUT:
        Journal(file.parent)
    elif file.parent.name == "kept":
        History.load(file)
    elif file.name == "report.html":
        if not file.read_text("utf-8").rstrip().endswith("</html>"):
            raise ValueError("its end is missing")
    elif file.name.startswith("layer-"):
        LayerStatistics.load(file)
    elif file.suffix == ".safetensors" or file.name == "net":
        load_file(file)
    elif file.suffix == ".gguf":
        GGUFReader(file)
    elif file.suffix == ".json":
        json.loads(file.read_text("utf-8"))
    elif file.suffix == ".jsonl":
        for line in file.read_text("utf-8").splitlines():
            json.loads(line)


def content(path: Path) -> Any:
    """What must be equal in two runs: a model's fingerprint, the bits of tensors, names of the
    others (which hold times).
    """
    if not path.exists():
        return None
    if (path / "config.json").exists():
        names = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
        return fingerprint_of(path), names
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        return [(str(p.relative_to(path)), content(p)) for p in inside]
    if path.name == "results.json":
        return [record["evaluation"] for record in json.loads(path.read_text("utf-8"))]
    if path.suffix == ".gguf":
        return path.stat().st_size
    if path.suffix in (".safetensors", ".edit") or path.name in ("h", "net"):
        return {name: tensors_module.checksum(t) for name, t in load_file(path).items()}
    return path.name


class Kills:
    """Commands stopped by a signal."""

    def __init__(self, folder: Path) -> None:
        self._held = contextlib.ExitStack()
        disk, mounted = self._held.enter_context(small_disk(folder))
        self.place = Place(disk, is_disk=mounted)

    def try_one(self, number: int, seed: int, tally: Tally) -> None:
        """The try of that number."""
        chance = random.Random(f"{seed} kill {number}")
        command = chance.choices(COMMANDS, [one.weight for one in COMMANDS])[0]
        try:
            self.place.learn(command)
            tally.outcomes[f"{command.name}, {self.what(command, chance)}"] += 1
        except Failed as problem:
            tally.fail(number, str(problem))

    def what(self, command: Command, chance: random.Random) -> str:
        """Stop it."""
        return self.place.kill(command, chance)

    def close(self) -> None:
        """Leave no disk behind."""
        self._held.close()


class Fills(Kills):
    """Commands on full disks."""

    def what(self, command: Command, chance: random.Random) -> str:
        """Fill the disk."""
        return self.place.fill(command, chance)
