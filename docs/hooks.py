"""What the site's builder needs beside mkdocs.yml: pages that stand elsewhere in the repository,
links between files made into links between pages, and formulas.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: Pages outside docs/: the file in the repository, and its page.
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "findings/README.md": "findings.md",
    "benchmarks/README.md": "benchmarks/running.md",
    **{
        f"knowedit_kernels/{op}/README.md": f"kernels/{op}.md"
        for op in ("moments", "lowrank", "solver", "target_loss", "jvp", "bench")
    },
}
_SOURCE = {page: file for file, page in ELSEWHERE.items()}
#: A Markdown link or picture: before the target, the target, its anchor, and the closing bracket.
LINK = re.compile(r"(\]\()([^)#\s:]*)(#[^)\s]*)?(\))")


def source_of(page: str) -> str:
    """The file of the repository that a page of the site is made of."""
    return _SOURCE.get(page, f"docs/{page}")


def place_of(file: str) -> str:
    """Where a file of the repository is on the site."""
    return ELSEWHERE.get(file) or (file[5:] if file.startswith("docs/") else file)


def linked(page: str, text: str) -> str:
    """The text of a page with its links, written between files, as links between pages."""
    folder = posixpath.dirname(source_of(page))

    def moved(link: re.Match[str]) -> str:
        before, target, anchor, after = link.groups()
        if not target:
            return link[0]
        place = place_of(posixpath.normpath(posixpath.join(folder, target)))
        return (
            before
            + posixpath.relpath(place, posixpath.dirname(page) or ".")
            + (anchor or "")
            + after
        )

    return LINK.sub(moved, text)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and the examples that stand outside docs/."""
    from mkdocs.structure.files import File

    for file, page in ELSEWHERE.items():
        files.append(
            File.generated(config, page, content=(ROOT / file).read_text(encoding="utf-8"))
        )
    for example in sorted((ROOT / "examples").rglob("*")):
        if example.is_file():
            name = example.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(example)))
    return files


def on_page_markdown(text: str, page: Any, **_: Any) -> str:
    """Mend the links of a page."""
    return linked(page.file.src_uri, text)


def formula(source: str, *_: Any, **__: Any) -> str:
    """A fenced block `math` in LaTeX as MathML, which browsers draw without a script."""
    from latex2mathml.converter import convert

    return f'<div class="math">{convert(source, display="block")}</div>'
