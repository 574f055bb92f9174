"""The parts below the editors, for code of your own: texts that you have as tokens, a place in a
template, keys and outputs in one pass, and the solve from a plain matrix.

Everything runs in float32 on the default model; nothing is written to it.
"""

import torch

import knowedit
from knowedit_kernels import EditSolver, cached_covariance

model = knowedit.load_model(dtype="float32")
layers = [4, 5]

# Second moments of the keys of several layers, over token lists that are in memory: nothing is cut,
# dropped or shuffled.
texts = ["Rome is the capital of Italy.", "Water boils at a hundred degrees.", "Ada wrote notes."]
moments = knowedit.second_moments(model, layers, [model.row(text * 8).ids for text in texts])
print({layer: f"{moment.count} keys of {moment.dim}" for layer, moment in moments.items()})

# Where a subject ends, in a template: the one at the braces, wherever else its name stands.
row = model.row("In Rome they say that {} is", "Rome", "old")
print(row, repr(model.tokenizer.decode(row.ids[: row.subject + 1])))
assert model.tokenizer.decode(row.ids[: row.subject + 1]).endswith("that Rome")

# Keys of several layers and the output of the deepest, at the subjects: one pass, which ends there.
rows = [row, model.row("{} is a", "Paris")]
keys, outputs = model.keys(rows, layers, outputs=True)
print({layer: tuple(found.shape) for layer, found in keys.items()}, tuple(outputs.shape))

# A plain matrix is factored once, however often it is passed: the solve costs what its keys cost.
covariance = moments[5].moment()
covariance.diagonal().add_(0.01 * covariance.diagonal().mean())  # few texts leave it singular
metric = cached_covariance(covariance, weight=100.0)
assert cached_covariance(covariance.clone(), weight=100.0).inverse(keys[5].T).isfinite().all()
out_factor, in_factor = EditSolver(metric, keys[5].double().T).apply(outputs.double().T)
dense = 100.0 * covariance + keys[5].double().T @ keys[5].double()
wanted = outputs.double().T @ keys[5].double() @ torch.linalg.inv(dense)
error = ((out_factor @ in_factor - wanted).norm() / wanted.norm()).item()
print(f"the update is MEMIT's, to {error:.0e}")
assert error < 1e-6
