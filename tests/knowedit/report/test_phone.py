"""Unit: no page runs past the right edge of a phone (390 px); wide tables scroll in their own box,
and a grid's table needs none on a laptop (1280 px). Looked at by a headless Chromium, where there
is one.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

from knowedit.evaluation.measures.base import fact_measures, model_measures
from knowedit.evaluation.sweep import table
from knowedit.io.tables import Column, Table
from knowedit.report import plots
from knowedit.report.page import Section, rendered, write_sections
from knowedit.report.prompts import Prompts

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDTH = 390
LONG = "HuggingFaceTB/SmolLM2-135M-Instruct_" + 60 * "a"  # nowhere to break it
SENTENCE = "The country that is to the north-west of the sea is located on the continent of"
#: Shows pages in frames as wide as a phone, and says of each what reaches beyond its right edge and
#: is not in a box that scrolls.
FRAMES = """<!doctype html><body><pre id="said"></pre><script>
const pages = PAGES, said = {};
const scrolls = (e, body) => e && e !== body &&
  (["auto", "scroll"].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement, body));
function look(name, frame) {
  const page = frame.contentDocument, root = page.documentElement;
  const over = [...page.body.querySelectorAll("*")].filter((e) =>
    e.getBoundingClientRect().right > root.clientWidth + 1 && !scrolls(e.parentElement, page.body));
  const boxes = [...page.querySelectorAll(".scroll")].filter((e) => e.scrollWidth > e.clientWidth);
  said[name] = { scrolled: boxes.map((e) => e.scrollWidth + " in " + e.clientWidth),
    scroll: root.scrollWidth, client: root.clientWidth, text: page.body.innerText,
    over: over.map((e) => e.tagName + " " + e.className + " " + e.textContent.slice(0, 40)) };
  document.getElementById("said").textContent = JSON.stringify(said);
}
for (const name of pages) {
  const frame = document.createElement("iframe");
  frame.style = "width: WIDTHpx; height: 844px; border: 0";
  frame.onload = () => {
    const form = frame.contentDocument.getElementById("form");
    if (form) form.requestSubmit();
    setTimeout(() => look(name, frame), 300);
  };
  frame.src = name;
  document.body.append(frame);
}
</script>"""


def a_run(path):
    """A page of results with all that one may have."""
    rate = {"mean": 0.5, "low": 0.25, "high": 0.75, "records": 4}
    methods = {name: {"efficacy": {"success": rate}} for name in ("MEMIT", "NeuronPatch", LONG)}
    wide = Table(
        ["", "measure", *(Column(name, ".3f", "right") for name in 4 * [SENTENCE, LONG])],
        [["efficacy", SENTENCE, *(8 * [0.5])]],
        SENTENCE,
        [LONG],
    )
    code = Table(["method", Column("record", code=True)], [[SENTENCE, json.dumps(methods)]])
    ratings = [[0.9, 0.1, 1], [0.2, None, 0]]
    rows = [[0, 0, SENTENCE, LONG, SENTENCE, ratings[0], ratings[1], ratings[0]]]
    sections = [
        Section(
            LONG, [wide, f"{LONG}: 0.5 s a fact", code], plots.measures(methods, methods["MEMIT"])
        ),
        Section("Every prompt", [], prompts=Prompts(["MEMIT", LONG], ["efficacy"], rows)),
        Section("To reproduce", [SENTENCE], settings={LONG: methods}),
    ]
    write_sections(path, LONG, sections)


def an_edit(path):
    """The page of one edit."""
    answers = [{"role": role, "p": 0.98, "width": 70} for role in ("new", "old")]
    said = {"said_before": LONG, "said_after": SENTENCE, "before": answers, "after": answers}
    row = {"first": True, "role": "consequence", "prompt": SENTENCE, **said}
    given = {"title": LONG, "method": "MEMIT", "layers": [4, 5], "rows": [row], "sections": []}
    path.write_text(rendered("edit.html.j2", **given), encoding="utf-8")


def a_trial(path):
    """The page of `knowedit try`, with an answer."""
    said = {"text": SENTENCE + LONG, "next": [[LONG, 0.9], [" a", 0.05]]}
    fact = {"prompt": SENTENCE, "target": LONG, "true": "B"}
    fact |= {when: {LONG: 0.9, "B": 0.1} for when in ("before", "after")}
    found = json.dumps({"asked": SENTENCE, "before": said, "after": said, "facts": [fact]})
    page = rendered(
        "try.html.j2",
        model=LONG,
        edits=[LONG, "MEMIT"],
        facts=[SENTENCE, LONG],
        first=SENTENCE,
        chat=True,
        longest=200,
    )
    answer = (
        f"<script>window.fetch = async () => ({{ok: true, json: async () => ({found})}})</script>"
    )
    path.write_text(page.replace("<body>", f"<body>{answer}"), encoding="utf-8")


def a_grid(path):
    """The page of a grid with all figures that its rows may have."""
    rate = {"mean": 0.987, "low": 0.912, "high": 1.0, "records": 48}
    shown = {kind: dict.fromkeys(of.shown, rate) for kind, of in fact_measures().items()}
    effects = {name: dict.fromkeys(of.shown, 28.41) for name, of in model_measures().items()}
    able = {when: {"knowledge": {"accuracy": rate}} for when in ("before", "after", "change")}
    rows = [
        {
            "method": "NeuronPatch",
            "settings": {"metric.gain": 0.95, "target.steps": 25},
            "reason": None,
            "result": {
                "evaluation": {"before": shown, "after": shown},
                "side_effects": effects,
                "ability": able,
                "seconds": 12.5,
            },
        }
    ]
    write_sections(path, LONG, [Section(LONG, [table({"rows": rows})])])


def looked_at(tmp_path, pages, width):
    """What a browser window of that width shows of the pages, by name."""
    for name, write in pages.items():
        write(tmp_path / name)
    frames = FRAMES.replace("PAGES", json.dumps(list(pages))).replace("WIDTH", str(width))
    (tmp_path / "frames.html").write_text(frames, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"]
    line = [str(CHROMIUM), *options, "--dump-dom", (tmp_path / "frames.html").as_uri()]
    dumped = subprocess.run(line, capture_output=True, text=True, timeout=120).stdout
    (shown,) = re.findall(r'<pre id="said">(.*?)</pre>', dumped, re.S)
    return json.loads(html.unescape(shown))


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_a_grids_table_fits_a_laptop(tmp_path):
    (seen,) = looked_at(tmp_path, {"grid.html": a_grid}, 1280).values()
    assert "portability exact" in seen["text"] and "s a fact" in seen["text"]
    assert seen["scrolled"] == [] and seen["over"] == []


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_pages_fit_a_phone(tmp_path):
    pages = {"run.html": a_run, "edit.html": an_edit, "try.html": a_trial}
    said = looked_at(tmp_path, pages, WIDTH)
    assert set(said) == set(pages)
    for name, seen in said.items():
        assert seen["over"] == [] and seen["scroll"] <= seen["client"] <= WIDTH, name
    assert "1 of 1 prompts" in said["run.html"]["text"]
    assert "Nearest facts" in said["try.html"]["text"]
