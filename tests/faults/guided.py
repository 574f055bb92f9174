"""Files of facts that are found by what they make the readers do (atheris, coverage-guided), beside
those that `fuzzing.py` draws; nothing where atheris is not installed.

    python -m tests.faults.guided -runs=200000      # libFuzzer's options

Only what reads facts is tried so, as it imports nothing heavy that would be instrumented too. The
first byte says the kind of file.
"""

from __future__ import annotations

import gzip
import logging
import sys
import tempfile
from pathlib import Path

KINDS = (".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz")
SEEDS = (
    b'{"prompt": "The capital of {} is", "subject": "France", "target": "Lyon", "true": "Paris"}',
    b'{"case_id": 1, "requested_rewrite": {"prompt": "{} is", "subject": "a", "target_new": '
    b'{"str": "b"}, "target_true": {"str": "c"}}, "neighborhood_prompts": ["d is"]}',
    b'{"subject": "a", "prompt": "a is", "target_new": "b", "ground_truth": ["c"], "portability": '
    b'{"x": [{"prompt": "d", "ground_truth": [["e"]]}]}, "locality": {"y": null}}',
    b'{"subject": "a", "src": "a?", "rephrase": "a??", "alt": "b", "answers": ["c"], "loc": "d"}',
    b'prompt,subject,target,neighbours\n"The capital of {} is",France,Lyon,"[""x""]"\n',
)


def main() -> int:
    """Try inputs until libFuzzer's options say that it is enough; it ends the process itself."""
    try:
        import atheris
    except ImportError:
        print("guided: atheris is not installed; inputs are drawn at random alone")
        return 0
    with atheris.instrument_imports(include=["knowedit"]):
        from knowedit.errors import KnowEditError
        from knowedit.facts.records import read_facts
        from knowedit.facts.sets import load
    logging.disable(logging.CRITICAL)
    folder = Path(tempfile.mkdtemp(prefix="guided-"))

    def try_one(data: bytes) -> None:
        kind = KINDS[(data[0] if data else 0) % len(KINDS)]
        path = folder / f"facts{kind}"
        path.write_bytes(gzip.compress(data[1:], 1) if kind.endswith(".gz") else data[1:])
        for read in (read_facts, load):
            try:
                read(path)
            except KnowEditError as error:
                if path.name not in str(error):
                    raise AssertionError(f"the error does not name the file: {error}") from error

    seeds = folder / "seeds"
    seeds.mkdir()
    for number, seed in enumerate(SEEDS):
        for kind in range(len(KINDS)):
            (seeds / f"{number}-{kind}").write_bytes(bytes([kind]) + seed)
    atheris.Setup([sys.argv[0], "-timeout=60", *sys.argv[1:], str(seeds)], try_one)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
