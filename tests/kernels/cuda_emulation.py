"""The index arithmetic of csrc/cuda, compiled for the CPU together with `syrk_emulation.cpp`."""

import ctypes
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from knowedit_kernels import _native

CONSTANTS = ("rows", "columns", "tokens", "layers", "threads", "accumulators", "shared")


class Emulation:
    def __init__(self):
        source = Path(__file__).with_name("syrk_emulation.cpp")
        with tempfile.TemporaryDirectory() as folder:
            library = f"{folder}/emulation.so"
            flags = ["-O2", "-std=c++20", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
            flags += [f"-I{_native.source_dir() / 'cuda'}", str(source), "-o", library]
            subprocess.run([*_native.compiler(), *flags], check=True)
            self.library = ctypes.CDLL(library)
        self.library.operand.restype = ctypes.c_uint64
        values = (ctypes.c_int * len(CONSTANTS))()
        self.library.constants(values)
        self.constants = dict(zip(CONSTANTS, values))

    def chain(self, index, tokens, cap, first):
        """(begin, end) of a chain and how many there are."""
        out = (ctypes.c_int * 3)()
        self.library.chain_bounds(index, tokens, cap, first, (cap // first).bit_length() - 1, out)
        return (out[0], out[1]), out[2]

    def operand(self, right, stage, k):
        """The descriptor of the right or left operand."""
        return self.library.operand(int(right), stage, k)

    def run(self, keys, tiles, cap, first):
        """c [d, d] over the tiles, and the number of stages run."""
        tokens, d = keys.shape
        keys = np.ascontiguousarray(keys.float().numpy())
        tiles, c = np.ascontiguousarray(tiles.numpy()), np.zeros((d, d))
        doublings = (cap // first).bit_length() - 1 if cap else 0
        pointers = (x.ctypes.data_as(ctypes.c_void_p) for x in (keys, c, tiles))
        at_keys, at_c, at_tiles = pointers
        ran = self.library.emulate(
            at_keys, tokens, d, at_c, at_tiles, len(tiles), cap, first, doublings
        )
        return torch.from_numpy(c), ran
