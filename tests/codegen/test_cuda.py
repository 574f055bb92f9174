"""The CUDA kernels compile for sm_90a, and to what they should; collected only where nvcc is (see
conftest.py) (unit).
"""

import re
import subprocess
import sys

import pytest
import torch

from knowedit_kernels import _native, _native_cuda
from tests.codegen.compiler import TOOLS, Compiled
from tests.codegen.test_moments import build
from tests.kernels.cuda_emulation import Emulation


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The library, not linked to libtorch_cuda, and what nvcc and ptxas said."""
    return _native_cuda.build(tmp_path_factory.mktemp("cuda"), torch_cuda=False)


@pytest.fixture(scope="module")
def kernels(library):
    """Kernel name -> its machine code."""
    sass = subprocess.run(
        [TOOLS / "cuobjdump", "-sass", library[0]], capture_output=True, text=True, check=True
    ).stdout
    parts = re.split(r"^\s*Function : (\S+)\s*$", sass, flags=re.M)
    return {name: body for name, body in zip(parts[1::2], parts[2::2]) if "syrk_kernel" in name}


def test_one_kernel_for_each_16_bit_type(kernels):
    found = {name: set(re.findall(r"HGMMA\.\S+", sass)) for name, sass in kernels.items()}
    assert sorted(map(sorted, found.values())) == [
        ["HGMMA.64x192x16.F32"],
        ["HGMMA.64x192x16.F32.BF16"],
    ]


def test_machine_code(kernels, library):
    shared = Emulation().constants["shared"]
    for name, sass in kernels.items():
        used = re.search(
            rf"Compiling entry function '{name}'.*?Used (\d+) registers", library[1], re.S
        )
        compiled = Compiled(90, int(used[1]), shared, sass, ptx="")
        compiled.check(mma="HGMMA")
        assert compiled.count("UTMALDG"), "keys are not copied by the bulk copy engine"
        products = re.findall(r"HGMMA.*", sass)
        assert len(products) == 4 and all("tnspA.tnspB" in product for product in products), (
            products
        )
        # 384 threads at entry; the two that multiply then take 240 each
        assert compiled.registers == 168 and compiled.count("USETMAXREG") == 2 and ", 0xf0" in sass
        assert "LDG.E.EF.128" in sass and "STG.E.EF.128" in sass, (
            "the fold does not move 16 bytes at a time"
        )


def test_the_compiler_neither_spills_nor_serialises(library):
    said = library[1]
    assert (
        len(re.findall(r"0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", said))
        == 2
    ), said
    assert "C75" not in said and "warning" not in said, said


def test_descriptors_are_those_of_triton():
    """Triton lays the same 64 tokens x 128 channels out alike, and is known to run: swizzle,
    strides and steps agree.
    """
    ptx = build(90, torch.bfloat16).ptx
    theirs = {int(x) for x in re.findall(r"(?:or\.b64|add\.s64)\s+%rd\d+, %rd\d+, (46116\d+)", ptx)}
    emulation = Emulation()

    def relative(right, k):  # to where the operand starts, as Triton's constants are
        return emulation.operand(right, 0, k) - (emulation.operand(right, 0, 0) & 0x3FFF)

    leading = 0x3FFF << 16  # has no meaning for a left operand of 64 channels: Triton leaves it out
    ours = {relative(True, k) for k in range(4)} | {relative(False, k) & ~leading for k in range(4)}
    assert ours == theirs and len(ours) == 8


LOAD = """
import ctypes, sys
import torch
import knowedit_kernels
ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_GLOBAL)
torch.ops.load_library(sys.argv[1])
op = torch.ops.knowedit.syrk_cuda_.default
# straight to the CUDA code, with CPU tensors
keys_on_cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
def call(d=64, layers=1, chain=512, first=64, dtype=torch.bfloat16, tiles=torch.int32):
    c = [torch.zeros(d, d, dtype=torch.float64) for _ in range(layers)]
    keys = [torch.zeros(128, d, dtype=dtype) for _ in range(layers)]
    try:
        op.redispatch(keys_on_cuda, c, keys, torch.zeros(1, 4, dtype=tiles), chain, first)
    except RuntimeError as error:
        print(str(error).partition("\\n")[0])
for changes in ({"d": 12}, {"layers": 17}, {"layers": 0}, {"chain": 500},
{"first": 32, "chain": 32}, {"dtype": torch.float32},
                {"tiles": torch.int64}, {}):
    call(**changes)
"""


def test_loads_into_torch_and_checks_its_arguments(library, tmp_path):
    """Everything up to the driver: registration against the schema, lists of tensors, refusals,
    then no driver.
    """
    stub = tmp_path / "stub.so"  # what libtorch_cuda has and a CPU build of torch has not
    code = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'
    command = [*_native.compiler(), "-shared", "-fPIC", "-x", "c++", "-", "-o", str(stub)]
    subprocess.run(command, input=code, text=True, check=True)
    arguments = [sys.executable, "-c", LOAD, str(library[0]), str(stub)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    expected = [
        "multiples of 8", "1 to 16 layers", "1 to 16 layers", "chain lengths must be multiples of "
        "64",
        "chain lengths must be multiples of 64", "all float16 or all bfloat16", "tiles must be",
        "cuTensorMapEncodeTiled",
    ]  # fmt: skip
    assert len(said) == len(expected) and all(
        words in line for words, line in zip(expected, said)
    ), said
