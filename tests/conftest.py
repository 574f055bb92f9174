"""Shared by all tests. The interpreter and codegen suites run in a process of their own, not in a plain run."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SEPARATE = (HERE / "interpret", HERE / "codegen")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Ignores the separate suites unless the command line names them: `make test` runs each by itself."""
    for suite in SEPARATE:
        if collection_path == suite:
            named = [Path(config.invocation_params.dir, str(arg).partition("::")[0]).resolve() for arg in config.args]
            return None if any(path == suite or suite in path.parents for path in named) else True
    return None
