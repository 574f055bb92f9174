#!/usr/bin/env bash
# Versions: torch 2.13.0, numpy 2.3.5 on Python 3.11 (seen with torch 2.15.0, too), on a CPU
# Expected: `torch.nn.functional.grouped_mm` multiplies rows that are sorted by expert with each expert's
#           matrix (its docstring); transformers 5 runs mixtures of experts with it. As of any product,
#           `sum().backward()` gives each row its expert's column sums.
# Seen:     "RuntimeError: Invalid strides/sizes, got [0, 0] for strides and [9, 8] for sizes": the gradient
#           of a sum is one number expanded to the output's shape, and its strides of 0 are refused. The
#           mean's gradient, and that of a sum with weights of 1, are written out: these work, and agree
#           with the product by hand.
# Here:     nothing; who sums what experts put out (attributions, Jacobians) multiplies by ones first
set -u
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 numpy==2.3.5 || exit 2
"$work/venv/bin/python" - <<'PY'
import torch
from torch.nn import functional as F

print(f"torch {torch.__version__}")
torch.manual_seed(0)
rows, experts = torch.randn(9, 16, requires_grad=True), torch.randn(4, 16, 8)
ends = torch.tensor([3, 3, 8, 9], dtype=torch.int32)  # of each expert's rows; the second has none
owner = torch.tensor([0, 0, 0, 2, 2, 2, 2, 2, 3])
by_hand = experts.sum(2)[owner]


def gradient(loss):
    (found,) = torch.autograd.grad(loss(F.grouped_mm(rows, experts, offs=ends)), rows)
    return found


for name, loss, scale in (
    ("mean", lambda out: out.mean(), 1 / 72),
    ("sum with weights of 1", lambda out: (out * torch.ones_like(out)).sum(), 1.0),
):
    off = (gradient(loss) - scale * by_hand).abs().max().item()
    print(f"{name}: {off:.1e} from the product by hand")
    assert off < 1e-4
try:
    gradient(lambda out: out.sum())
except RuntimeError as error:
    print("sum:", str(error).splitlines()[0])
    assert "strides" in str(error)
else:
    raise SystemExit("changed: the sum has a gradient")
print("as described: no gradient of a plain sum")
PY
