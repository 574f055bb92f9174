"""Puts csrc, and where possible the compiled CPU library, into the wheel; the rest is in
pyproject.toml.

torch is not imported, and may be absent: then the library is compiled at first use instead.
"""

import runpy
from pathlib import Path

from setuptools import Distribution, find_namespace_packages, setup
from setuptools.command.build_py import build_py

NATIVE = runpy.run_path(str(Path(__file__).parent / "knowedit_kernels" / "_native.py"))


class BuildWithNative(build_py):
    def finalize_options(self) -> None:
        super().finalize_options()
        sources = "knowedit_kernels._csrc"
        found = (f"{sources}.{name}" for name in find_namespace_packages("csrc"))
        self.packages = [*(self.packages or ()), sources, *found]
        self.package_dir = {**(self.package_dir or {}), sources: "csrc"}

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


setup(cmdclass={"build_py": BuildWithNative}, distclass=PlatformDistribution)
