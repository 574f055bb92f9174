"""What a caller may have switched on changes no result: autocast, inference mode, a default device,
torch.compile (unit).
"""

import ast
import types
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import knowedit_kernels
from knowedit_kernels import jvp
from knowedit_kernels.lowrank import WeightLedger, low_rank_update_
from knowedit_kernels.moments import SecondMoment, second_moment_
from knowedit_kernels.solver import Covariance, EditSolver
from knowedit_kernels.solver.cache import cached_covariance, content_of, forget_factors
from knowedit_kernels.target_loss import target_loss

SOURCES = sorted(
    path
    for path in Path(knowedit_kernels.__file__).parent.rglob("*.py")
    if "bench" not in path.parts
)
FACTORIES = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn"}
FACTORIES |= {"randperm", "tensor", "zeros"}


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


SHORT = draw(1, 1, 3, 4)
HEAD, ROWS, PROBE = draw(50, 16), torch.arange(6), draw(16, 2)


def updated(**options):
    W = draw(12, 16, dtype=torch.bfloat16)
    report = low_rank_update_(W, draw(12, 3), draw(16, 3), probe=draw(16, 2), **options)
    return W, report.probe_error


OPS = {
    "second_moment": lambda: second_moment_(
        torch.zeros(16, 16, dtype=torch.float64), draw(40, 16), precision="fp32"
    ),
    "low_rank_update": lambda: updated()[0],
    "corrected": lambda: updated(rounding="corrected")[1],
    "target_loss": lambda: (
        target_loss(draw(6, 16), draw(50, 16), torch.arange(6), ref_hidden=draw(6, 16, seed=1)).kl
    ),
    "rms_norm": lambda: jvp.rms_norm_jvp(draw(4, 8), draw(8), draw(3, 4, 8)).tangents,
    "swiglu": lambda: jvp.swiglu(draw(4, 8), draw(4, 8, seed=1)),
    "attention": lambda: jvp.attention(draw(1, 2, 5, 8), draw(1, 2, 5, 8), draw(1, 2, 5, 8)),
    "attention_jvp": lambda: (
        jvp.attention_jvp(*[draw(1, 2, 5, 8)] * 3, draw(2, 1, 2, 5, 8), None, None).tangents
    ),
    "attention through torch.func": lambda: torch.func.grad(
        lambda q: jvp.attention(q, SHORT, SHORT).square().sum()
    )(draw(1, 1, 2, 4)),
    "digest": lambda: torch.tensor(list(content_of(draw(16, 16)).encode())),
}


@pytest.fixture
def torch_paths(monkeypatch):
    """No compiled kernels: what is in torch's own products is what autocast would lower."""
    monkeypatch.setenv("KNOWEDIT_IMPL", "torch")


@pytest.mark.usefixtures("torch_paths")
@pytest.mark.parametrize("op", OPS)
def test_autocast_lowers_no_arithmetic(op):
    expected = OPS[op]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(OPS[op](), expected)


def test_a_moment_made_in_inference_mode_goes_on_outside_and_the_other_way_round():
    keys = draw(40, 8)
    with torch.inference_mode():
        inside = SecondMoment(8).update(keys[:20])
        made_inside = keys * 1
    inside.update(keys[20:])
    outside = SecondMoment(8).update(made_inside)
    with torch.inference_mode():
        outside.merge(SecondMoment(8).update(keys))
    assert torch.equal(inside.sum(), SecondMoment(8).update(keys).sum())
    assert torch.equal(outside.sum(), 2 * inside.sum())


def test_a_factor_made_in_inference_mode_has_derivatives():
    C = draw(20, 8, dtype=torch.float64)
    C = C.T @ C
    forget_factors()
    with torch.inference_mode():
        factors = [Covariance(C * 1), cached_covariance(C * 1)]
    for factor in factors:
        K = draw(8, 2, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradgradcheck(lambda K, f=factor: EditSolver(f, K).A, K)


def test_weights_made_in_inference_mode_are_edited_and_restored():
    with torch.inference_mode():
        W = draw(6, 8, dtype=torch.bfloat16) * 1
        before = W.clone()
        ledger = WeightLedger({"W": W})
        ledger.add("W", draw(6, 2), draw(8, 2), "first")
    ledger.add("W", draw(6, 2, seed=1), draw(8, 2, seed=1), "second")
    ledger.remove("first")
    ledger.remove("second")
    assert torch.equal(W, before)


def test_every_tensor_names_its_device():
    """Else torch.set_default_device decides where it is made."""
    bare = [
        f"{path.name}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in {f"torch.{name}" for name in FACTORIES}
        and not {"device", None} & {keyword.arg for keyword in node.keywords}
    ]
    assert not bare


def test_a_default_device_changes_nothing():
    expected = [OPS["digest"](), *updated()]
    made = [draw(12, 16), draw(12, 3), draw(16, 3)]
    with torch.device("meta"):
        moment = SecondMoment(16).update(made[0])
        assert moment.audit().ok() and moment.state_dict()["count"].device.type == "cpu"
        ledger = WeightLedger({"W": made[0]})
        ledger.add("W", *made[1:], "edit")
        ledger.verify()
    assert all(torch.equal(a, b) for a, b in zip([OPS["digest"](), *updated()], expected))


def test_triton_is_launched_in_one_place_alone():
    """`_device.launch` makes the tensors' device the current one; Triton itself does not."""
    launches = [
        f"{path.name}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and "kernel" in ast.unparse(node.func.value)
        and "Kernels" not in ast.unparse(node.func)
    ]
    assert len(launches) == 1 and launches[0].startswith("_device.py")


def compiled(function, *arguments, backend="eager"):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend)(*arguments)


DIFFERENTIABLE = {
    "target_loss": (
        lambda h: target_loss(h, HEAD, ROWS).ce,
        [draw(6, 16)],
    ),
    "rms_norm": (jvp.rms_norm, [draw(4, 8), draw(8)]),
    "rms_norm_jvp": (
        lambda *given: jvp.rms_norm_jvp(*given).tangents,
        [draw(4, 8), draw(8), draw(3, 4, 8)],
    ),
    "swiglu_jvp": (
        lambda *given: jvp.swiglu_jvp(*given).tangents,
        [draw(4, 8), draw(4, 8, seed=1), draw(3, 4, 8), draw(3, 4, 8, seed=1)],
    ),
    "attention": (lambda q, k: jvp.attention(q, k, k), [draw(1, 2, 5, 8), draw(1, 2, 5, 8)]),
    "attention_jvp": (
        lambda q, t: jvp.attention_jvp(q, q, q, t, None, None).tangents,
        [draw(1, 2, 5, 8), draw(2, 1, 2, 5, 8)],
    ),
}


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_compiles_whole_with_gradients(op):
    function, given = DIFFERENTIABLE[op]
    given = [x.clone().requires_grad_() for x in given]
    values = [function(*given), compiled(function, *given)]
    gradients = [torch.autograd.grad(value.square().sum(), given) for value in values]
    assert torch.equal(*values)
    for eager, traced in zip(*gradients):
        torch.testing.assert_close(eager, traced, rtol=1e-5, atol=1e-6)


def test_updates_compile_whole():
    keys, mask = draw(700, 8), torch.arange(700) % 3 > 0
    several = [SecondMoment(8), SecondMoment(8)]

    def step(keys, mask):
        several[0].update(keys)
        several[1].update(keys, mask)
        several[0].update(2 * keys)

    compiled(step, keys, mask, backend="aot_eager")
    expected = SecondMoment(8).update(keys).update(2 * keys), SecondMoment(8).update(keys[mask])
    for got, wanted in zip(several, expected):
        assert got.count == wanted.count and torch.equal(got.sum(), wanted.sum())
    with pytest.raises(ValueError, match="NaN or infinite"):
        compiled(step, keys / 0, mask)

    W, U, V = draw(12, 16, dtype=torch.bfloat16), draw(12, 3), draw(16, 3)
    report = compiled(lambda *given: low_rank_update_(*given, probe=PROBE), W, U, V)
    assert torch.equal(W, updated()[0]) and torch.equal(report.probe_error, updated()[1])
    with pytest.raises(ValueError, match="contains NaN"):
        compiled(low_rank_update_, W, U / 0, V)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        compiled(lambda h, t: target_loss(h, h, t).ce, draw(6, 16), torch.full((6,), 6))


class Listener(TorchDispatchMode):
    """Keeps the names of the ops that pass."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.heard.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_the_update_and_a_fake_one_computes_nothing():
    expected = updated()
    with Listener() as listener:
        W, error = updated()
    assert listener.heard.count("knowedit.low_rank_update_.default") == 1
    assert torch.equal(W, expected[0]) and torch.equal(error, expected[1])
    with FakeTensorMode(), torch.device("cpu"):
        fake = torch.empty(12, 16)
        assert isinstance(low_rank_update_(fake, fake[:, :1], fake[:1].mT)._sums, FakeTensor)


def test_every_name_of_torch_exists():
    """Also in the code for GPUs, which nothing here runs."""
    wrong = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                first, *names = ast.unparse(node).split(".")
                found = torch
                if first == "torch" and names[0] != "ops" and all(map(str.isidentifier, names)):
                    for name in names:
                        found = getattr(found, name, wrong)
                        if not isinstance(found, (types.ModuleType, type)):
                            break
                    if found is wrong:
                        wrong.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong
