"""Puts the compiled CPU library into the wheel where that is possible; everything else is in
pyproject.toml.

torch is not imported, and may be absent: then the library is compiled at first use instead.
"""

import runpy
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

NATIVE = runpy.run_path(str(Path(__file__).parent / "knowedit_kernels" / "_native.py"))


class BuildWithNative(build_py):
    def run(self) -> None:
        super().run()
        # an editable install compiles at first use, into the cache, so that no stale library stays
        # in the tree
        if not self.editable_mode:
            try:
                NATIVE["build"](Path(self.build_lib) / "knowedit_kernels")
            except NATIVE["NativeBuildError"] as error:
                print(f"no prebuilt CPU library ({error}); it will be compiled at first use")


class PlatformDistribution(Distribution):
    """The wheel may hold a compiled library, so it is tagged for this platform."""

    def has_ext_modules(self) -> bool:
        return True


ROOT = Path(__file__).parent
SOURCES = [
    ROOT / "csrc",
    *sorted(folder for folder in (ROOT / "csrc").iterdir() if folder.is_dir()),
]

setup(
    packages=[
        *find_packages(str(ROOT / "python")),
        *find_packages(str(ROOT), include=["knowedit_kernels", "knowedit_kernels.*"]),
        # the sources travel with the wheel, for what is compiled at first use
        *(".".join(("knowedit_kernels._csrc", *at.relative_to(ROOT).parts[1:])) for at in SOURCES),
    ],
    package_dir={"knowedit": "python/knowedit", "knowedit_kernels._csrc": "csrc"},
    cmdclass={"build_py": BuildWithNative},
    distclass=PlatformDistribution,
)
