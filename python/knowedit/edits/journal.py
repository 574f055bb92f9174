"""A history that is kept on disk while it grows: one file an edit, in one folder.

    session.safetensors           the model's fingerprint, and the record of the method
    000001-000365.safetensors     a year that was merged, and
    000366.safetensors            an edit: histories of one edit each (`History.save`)
    undone/                       what was taken back, for whoever wants it again

Every file appears whole or not at all, and is checked when it is read. A day that is interrupted
before its file is there was never written; one that is interrupted while files are taken back has
taken back the last of them. What a merged file covers does not count any more, also where a crash
has left it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from knowedit.edits.edit import Edit
from knowedit.edits.history import EARLIER, History
from knowedit.edits.history import FORMAT as HISTORY
from knowedit.errors import EditError
from knowedit.io.tensors import format_of, read_file, understood, write_file
from knowedit.models.editable import EditableModel

ABOUT = "session.safetensors"
UNDONE = "undone"
FORMAT = "knowedit-session/1"
NAME = re.compile(r"(\d{6,})(?:-(\d{6,}))?\.safetensors")


def edits_in(path: str | Path) -> list[Edit]:
    """The edits of a session's folder or a history's file, oldest first, or that of an edit file.
    Raises EditError: it is none of these.
    """
    if Path(path).is_dir():
        return Journal(path).read().edits
    known = (HISTORY, *EARLIER)
    return History.load(path).edits if format_of(path) in known else [Edit.load(path)]


class Journal:
    """The folder of one session. Who changes it holds `knowedit.io.files.locked(folder)`.

    Attributes:
        fingerprint: of the unedited model.
        method: the record of the method.
        run: what its edits are computed with, as the command line has it (`cli.session`); perhaps
            nothing.
        open: False once the session is closed; nothing can be written then.

    Raises:
        EditError: the folder has no record of a session, or a damaged one.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / ABOUT).is_file():
            raise EditError(f"{folder} is not the folder of a session: it has no {ABOUT}")
        header, _ = read_file(self.folder / ABOUT, FORMAT, "the record of a session")
        with understood(self.folder / ABOUT, "the record of a session"):
            self.fingerprint: str = header["fingerprint"]
            self.method: dict[str, Any] = dict(header["method"])
            self.run: dict[str, Any] = dict(header.get("run", {}))
            if not all(isinstance(one, str) for one in (self.fingerprint, self.method["kind"])):
                raise TypeError("fingerprint and method.kind are texts")
        self.open = True

    @classmethod
    def begin(
        cls,
        folder: str | Path,
        fingerprint: str,
        method: Mapping[str, Any],
        run: Mapping[str, Any] | None = None,
    ) -> Journal:
        """The session of `folder`, begun where there is none."""
        record = Path(folder) / ABOUT
        if not record.is_file():
            about = {"format": FORMAT, "fingerprint": fingerprint, "method": dict(method)}
            about |= {"run": dict(run)} if run else {}
            write_file(record, {}, about)
        return cls(folder)

    def check(self, model: EditableModel) -> None:
        """Raise EditError unless it is a session of `model`."""
        if self.fingerprint != model.fingerprint:
            raise EditError(
                f"{self.folder} belongs to a model with fingerprint {self.fingerprint[:12]}, but "
                f"{model.name} has {model.fingerprint[:12]}; begin another folder for it"
            )

    def read(self) -> History:
        """The whole history.

        Raises:
            EditError: a file is damaged, missing, or of another session.
        """
        found = History(self.fingerprint)
        for path in self._files():
            part = History.load(path)
            if part.fingerprint != self.fingerprint or len(part) != 1 or (part.folded and found):
                raise EditError(f"{path} is not the next edit of this session; put it elsewhere")
            found = part if not found else found.followed_by(part.edits[0])
        return found

    def append(self, history: History) -> None:
        """Write the last edit of `history`, which is not there yet. Interrupted, it leaves none."""
        self._check_open()
        number = self._last() + 1
        path = self._path(number, number)
        try:
            History(self.fingerprint, history.edits[-1:]).save(path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def take_back(self, key: str) -> None:
        """Put the file of the last edit, whose key this is, into `undone`."""
        self._check_open()
        last = self._files()[-1]
        (self.folder / UNDONE).mkdir(exist_ok=True)
        os.replace(last, self.folder / UNDONE / f"{last.stem}.{key}{last.suffix}")

    def merge(self, history: History) -> None:
        """Write `history.edits[0]`, into which the first edits were merged, in place of theirs."""
        self._check_open()
        spans = self._spans()
        count = len(spans) - len(history) + 1
        one = History(self.fingerprint, history.edits[:1], history.folded, history.state)
        one.save(self._path(1, spans[count - 1][1]))
        self.tidy()

    def tidy(self) -> None:
        """Remove the files of edits that were merged, an interrupted merge's too."""
        self._check_open()
        counted = set(self._files())
        for path in map(self.folder.joinpath, os.listdir(self.folder)):
            if NAME.fullmatch(path.name) and path not in counted:
                path.unlink()

    def _check_open(self) -> None:
        if not self.open:
            raise EditError(f"the session of {self.folder} is closed; open it again")

    def _path(self, first: int, last: int) -> Path:
        span = f"{first:06}" if first == last else f"{first:06}-{last:06}"
        return self.folder / f"{span}.safetensors"

    def _last(self) -> int:
        spans = self._spans()
        return spans[-1][1] if spans else 0

    def _files(self) -> list[Path]:
        return [self._path(*span) for span in self._spans()]

    def _spans(self) -> list[tuple[int, int]]:
        """The first and the last number of each file that counts, in order.

        Raises:
            EditError: a number is missing.
        """
        names = filter(None, map(NAME.fullmatch, os.listdir(self.folder)))
        found = sorted((int(name[1]), int(name[2] or name[1])) for name in names)
        merged = max((last for first, last in found if last > first), default=0)
        spans = [(a, b) for a, b in found if b > merged or (b == merged and b > a)]
        for (_, before), (after, _) in zip([(0, 0), *spans], spans):
            if after != before + 1:
                raise EditError(
                    f"{self.folder} has edit {after} but none of number {before + 1}: bring the "
                    "missing file back, or move the later ones away"
                )
        return spans
