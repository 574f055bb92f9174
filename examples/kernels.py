"""The kernels alone, on plain tensors: measure what a layer does, write into it, and take it back.

One linear layer maps keys [d_ff] to outputs [d_model]. Eight keys get new outputs; all other keys,
as the second moment of 8,192 tokens knows them, shall keep theirs. Needs no model.
"""

import torch

import knowedit_kernels as kernels

torch.manual_seed(0)
d_model, d_ff, edits = 64, 256, 8
weight = (0.05 * torch.randn(d_model, d_ff)).bfloat16()
before = weight.clone()

# Keys of ordinary text are correlated: most of their size lies in few directions.
mixing = torch.randn(d_ff, d_ff) * (torch.arange(1, d_ff + 1) ** -0.5)
ordinary = torch.randn(8192, d_ff) @ mixing.T
moment = kernels.SecondMoment(d_ff)
for batch in ordinary.split(1000):
    moment.update(batch)
covariance = moment.moment()  # float64 [d_ff, d_ff], the mean of k kᵀ
print(moment.audit())

# What to write: new outputs at eight keys.
keys = mixing @ torch.randn(d_ff, edits)
residuals = torch.randn(d_model, edits)

# Which way to write it: the update that changes ordinary outputs least, weighed so that an edit
# written alone realises 95 % of its residual.
metric = kernels.Covariance(covariance)
metric = metric.with_weight(kernels.weight_for_gain(metric, keys, gain=0.95))
solver = kernels.EditSolver(metric, keys)
print("planned share of each edit:", [round(gain, 3) for gain in solver.gain.tolist()])

# Write it. A ledger keeps what is needed to take any edit out again, bit for bit.
ledger = kernels.WeightLedger({"layer": weight})
out_factor, in_factor = solver.apply(residuals)  # [d_model, edits], [edits, d_ff]
report = ledger.add("layer", out_factor, in_factor.T, key="eight facts")
print(report)
print(kernels.explain("low_rank_update_"))

change = weight.float() - before.float()
written = ((change @ keys).norm() / residuals.norm()).item()
ordinary_outputs = ordinary @ before.float().T
disturbed = ((ordinary @ change.T).norm() / ordinary_outputs.norm()).item()
print(f"written {written:.0%} of what was asked; ordinary outputs moved by {disturbed:.1%}")
assert written > 0.9 and disturbed < 0.15

ledger.remove("eight facts")
assert torch.equal(weight, before)
print("undone: every bit is back")
