"""The command line in this process, as tests type it."""

import json
import sys

from knowedit.cli.app import main
from knowedit.cli.printed import JSON


class CommandLine:
    """Run command lines in a folder, offline and with a cache of their own.

    Attributes:
        first: words before all others.
        said: what the last one printed, as pytest captured it.
    """

    def __init__(self, monkeypatch, capsys, folder, *first, cache=None):
        monkeypatch.chdir(folder)
        monkeypatch.setenv("KNOWEDIT_CACHE", str(cache or folder / "cache"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        self.monkeypatch, self.capsys, self.first, self.said = monkeypatch, capsys, first, None

    def __call__(self, *arguments, code=0):
        """What it printed, with the errors where it ends with another code than 0. JSON must have
        the keys that the reference names.
        """
        words = [*self.first, *arguments]
        self.monkeypatch.setattr(sys, "argv", ["knowedit", *words])
        self.capsys.readouterr()
        try:
            main()
            left = 0
        except SystemExit as stop:
            left = stop.code or 0
        self.said = self.capsys.readouterr()
        assert left == code, self.said.out + self.said.err
        if code == 0 and "--json" in words:
            check_json(words, self.said.out)
        return self.said.out if code == 0 else self.said.out + self.said.err


def check_json(words, printed):
    """Whether `printed` is what the reference says of the command."""
    two, record = " ".join(words[:2]), json.loads(printed)
    name = two if two in JSON else {"stats": "stats collect"}.get(words[0], words[0])
    keys = list(record[0] if isinstance(record, list) else record)
    assert any(kind.fits(record) for kind in JSON[name]), f"{name}: {keys}"
