"""UltraEdit: its formula and its running normalisation, against loops in float64 (unit)."""

import copy
from dataclasses import replace

import pytest
import torch

from knowedit.edits.history import History
from knowedit.errors import EditError, ModelError
from knowedit.methods import UltraEdit
from knowedit.methods.gradient.named.ultraedit import normalised
from knowedit.methods.session import Session
from knowedit.models.editable import EditableModel
from tests.knowedit.methods.helpers import FACTS

PUBLISHED = UltraEdit(layers=(2, 3), lr=1e-4, ridge=1.0)


def seen_by(model, facts, name):
    """Inputs and gradients of a module's output at the scored tokens, each fact run alone."""
    inputs, gradients = [], []
    module = model.hf.get_submodule(name)
    for fact in facts:
        row = model.row(fact.text, answer=fact.target)
        kept = {}

        def keep(module, given, output, kept=kept):
            kept["x"] = given[0].detach()
            kept["y"] = output.detach().requires_grad_()
            return kept["y"]

        handle = module.register_forward_hook(keep)
        logits = model.hf(input_ids=torch.tensor([row.ids])).logits[0]
        handle.remove()
        places = range(row.answer - 1, len(row.ids) - 1)
        wanted = torch.tensor([row.ids[place + 1] for place in places])
        loss = torch.nn.functional.cross_entropy(logits[list(places)], wanted)
        (y,) = torch.autograd.grad(loss, kept["y"])
        inputs.append(kept["x"].reshape(-1, kept["x"].shape[-1])[list(places)])
        gradients.append(y.reshape(-1, y.shape[-1])[list(places)])
    return torch.cat(inputs), torch.cat(gradients)


def published(X, Y, earlier, lr=1e-4):
    """`Delta` `[out, in]`; `earlier`: rows of earlier edits, which only count in the
    normalisation.
    """
    rows = torch.cat([X, Y], 1)
    everything = torch.cat([*earlier, rows])
    rows = (rows - everything.mean(0)) / (everything.std(0) + 1e-7)
    X_hat, Y_hat = rows[:, : X.shape[1]], rows[:, X.shape[1] :]
    V = -lr * (X_hat * X_hat).sum(1, keepdim=True) * Y_hat
    return torch.linalg.solve(X.T @ X + torch.eye(X.shape[1], dtype=X.dtype), X.T @ V).T


@pytest.mark.parametrize("tiny", ["tiny_llama", "tiny_gpt2"])
def test_the_published_formula_with_its_running_normalisation(request, tiny):
    given = request.getfixturevalue(tiny)
    model = EditableModel(copy.deepcopy(given.hf).double(), given.tokenizer)
    names, history = PUBLISHED.weights(model), History(model.fingerprint)
    assert len(names) == (6 if tiny == "tiny_llama" else 4)
    earlier = {name: [] for name in names}
    for facts in (FACTS[:2], FACTS[2:]):
        found = {name: seen_by(model, facts, name) for name in names}
        made = PUBLISHED.compute(model, facts, history=history, progress=False)
        for name, (X, Y) in found.items():
            wanted = published(X, Y, earlier[name])
            delta = made.delta(f"{name}.weight").double()
            assert (delta - wanted).norm() <= 1e-6 * wanted.norm() > 0
            earlier[name].append(torch.cat([X, Y], 1))
        made.apply(model)
        history.add(made)
    for edit in history.edits:
        edit.undo(model)


def test_what_it_has_seen_goes_on_in_a_file_and_after_a_merge(tiny_llama, tmp_path):
    method = UltraEdit(layers=(2,))
    with Session(method, tiny_llama) as session:
        session.write(FACTS[:1], force=True, progress=False)
        session.write(FACTS[1:2], force=True, progress=False)
        read = History.load(session.history.save(tmp_path / "h.safetensors"))
        third = [
            method.compute(tiny_llama, FACTS[2:], history=known, progress=False).carried
            for known in (session.history, read)
        ]
        session.compact()
        third.append(method.compute(tiny_llama, FACTS[2:], history=session.history).carried)
        alone = method.compute(tiny_llama, FACTS[2:], progress=False).carried
        tokens = [len(tiny_llama.row(f.text, answer=f.target).ids) for f in FACTS]
        scored = [n - tiny_llama.row(f.text, answer=f.target).answer for n, f in zip(tokens, FACTS)]
        for name, moments in alone.items():
            assert float(third[0][name][0, 0]) == sum(scored)
            assert float(moments[0, 0]) == scored[2]
            assert torch.equal(third[0][name], third[1][name])
            assert float(third[2][name][0, 0]) == sum(scored)


def test_the_step_is_a_share_of_the_output(tiny_llama):
    """And half the step is half the change: the formula is linear in it."""
    made = [
        replace(UltraEdit(layers=(2,)), step=step).compute(tiny_llama, FACTS, progress=False)
        for step in (0.04, 0.08)
    ]
    for name, change in made[0].changes.items():
        torch.testing.assert_close(2 * change.dense(), made[1].changes[name].dense())
    said = made[0].report.details["modules"]["model.layers.2.mlp.down_proj"]
    assert said["lr"] > 0 and said["ridge"] > 0 and 0.5 < said["gain"] < 1


def test_what_it_refuses(tiny_llama):
    with pytest.raises(EditError, match="one answer token alone cannot be normalised"):
        normalised(torch.ones(1, 3), torch.zeros(3, 3))
    with pytest.raises(EditError, match="first layer cannot be changed"):
        UltraEdit(layers=(0,)).compute(tiny_llama, FACTS)
    with pytest.raises(EditError, match="name at least one layer"):
        UltraEdit(layers=()).weights(tiny_llama)
    with pytest.raises(EditError, match="no linear layers nothing"):
        UltraEdit(layers=(2,), modules=("nothing",)).weights(tiny_llama)
    with pytest.raises(ModelError):
        UltraEdit(layers=(9,)).weights(tiny_llama)
    for wrong in ({"step": 0}, {"lr": -1}, {"ridge": 0}, {"gain": 1.0}):
        with pytest.raises(EditError, match="ultraedit"):
            UltraEdit(**wrong)
