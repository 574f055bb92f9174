"""Names of models, methods, facts and files that would be code, formulas or orders to a terminal:
pages and terminals show them as text (unit).
"""

import json
import logging
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from knowedit.cli import app
from knowedit.edits.card import card
from knowedit.io.lines import HIDDEN, printable
from knowedit.io.tensors import opened, write_file
from knowedit.report.run import PAGE, report
from tests.faults.test_damaged import FILES, V1

NAME = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{7*7}}$\\frac{$\x1b[2J\u202egnp"
RUN = FILES / "report" / "runs_0_1" / "batch" / "results.json"
#: What a fact's text may hold besides: half a pair of UTF-16, which no encoding has.
SUBJECT = f"{NAME}\ud800"


class Tags(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.said = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.said.append(data)


def test_reports(tmp_path):
    plain, hostile = tmp_path / "plain", tmp_path / "hostile"
    names = dict.fromkeys(("model", "method", "dataset"), NAME)
    for folder, named in ((plain, {}), (hostile, names)):
        folder.mkdir()
        results = [result | named for result in json.loads(RUN.read_text())]
        (folder / "results.json").write_text(json.dumps(results))
        report(folder)
    pages = [Tags((folder / PAGE).read_text()) for folder in (plain, hostile)]
    scripts = [sum(tag == "script" for tag, _ in page.tags) for page in pages]
    assert scripts[0] == scripts[1]
    page = pages[1]
    assert not any(tag == "img" for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, given in page.tags for name in given)
    assert any("<img src=x onerror=alert(1)>" in said for said in page.said)
    assert any("{{7*7}}" in said for said in page.said)


def test_cards():
    fact = {"prompt": "{} is in", "subject": NAME, "target": NAME}
    made = {"method": NAME, "key": NAME, "facts": [fact]}
    text = card("x", NAME, f"{NAME}\n# Another", "opening", [made])
    prose = text.partition("```")[0]
    assert not [tag for tag, _ in Tags(prose).tags if tag in ("script", "img")]
    assert "\n# Another" not in text and "base_model" not in text


def said(capsys, monkeypatch, *words):
    """What a command prints."""
    monkeypatch.setattr(sys, "argv", ["knowedit", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        app.main()
    out, err = capsys.readouterr()
    for text in (out, err):
        assert not HIDDEN.search(text), (words, text)
        text.encode()
    return end.value.code, out + err


def test_terminals(tmp_path, capsys, monkeypatch):
    with opened(V1 / "memit-llama.safetensors") as file:
        header, tensors = file.header, file.tensors()
    header |= {"method": NAME, "fingerprint": NAME}
    header["facts"] = [{**header["facts"][0], "subject": NAME, "target": NAME}]
    header["report"]["warnings"] = [NAME]
    path = write_file(tmp_path / "a.edit", tensors, header)
    code, text = said(capsys, monkeypatch, "inspect", path)
    assert code == 0 and r"\x1b[2J\u202egnp" in text and "<script>" in text, text
    fact = {"prompt": "{} is in", "subject": SUBJECT, "target": "Rome"}
    (tmp_path / "f.jsonl").write_text(json.dumps(fact))
    assert "f.jsonl" in said(capsys, monkeypatch, "inspect", tmp_path / "f.jsonl")[1]
    for name in ("\x1b[2J.edit", "\u202egnp.edit", "\udcff.edit", "no\nsuch.edit"):
        assert said(capsys, monkeypatch, "inspect", tmp_path / name)[0] == 1
        assert said(capsys, monkeypatch, "undo", tmp_path / name)[0] == 1


def test_warnings(capsys, monkeypatch, tmp_path):
    def warn(*_, **__):
        logging.getLogger("knowedit.x").warning("%s is odd", NAME)
        raise SystemExit(0)

    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr("knowedit.cli.inspection.describe", warn)
    _, text = said(capsys, monkeypatch, "inspect", tmp_path)
    assert r"WARNING <script>" in text and r"\x1b[2J\u202egnp is odd" in text


def test_pictures():
    from matplotlib import pyplot

    from knowedit.report import plots

    figure, axes = plots.panels(1)
    axes[0].plot([0, 1], label=NAME.replace("\x1b", ""))
    axes[0].set_title("$\\frac{$ 5 $")
    axes[0].legend()
    drawn = plots.svg(figure)
    assert not [one for one in ET.fromstring(drawn).iter() if one.tag.endswith("script")]
    pyplot.close("all")


def test_what_is_spelled_out():
    assert printable("a\x00b\x9fc\u202ed\udcffe\r") == "a\\x00b\\x9fc\\u202ed\\udcffe\\x0d"
    assert printable("naïve عربي 東京\t🙂\n") == "naïve عربي 東京\t🙂\n"
