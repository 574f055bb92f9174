"""Fine-tuning, FT-L and LoRA, plain or regularised: against naive loops and peft itself, and the
model as it was (unit).
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from knowedit.cli.inspection import describe
from knowedit.edits.edit import Edit
from knowedit.edits.history import History
from knowedit.errors import ConfigError, EditError, ModelError
from knowedit.evaluation.baseline import Baseline
from knowedit.evaluation.protocols import run
from knowedit.evaluation.sequence import total_norms
from knowedit.facts.fact import Fact, FactError, Probe
from knowedit.io.memory import peak_memory
from knowedit.methods import (
    FTL,
    FineTuning,
    KLFineTuning,
    KLLoRA,
    LoRA,
    RegularisedLoRA,
)
from knowedit.methods.gradient.descent import descend
from knowedit.methods.gradient.method import GradientMethod
from knowedit.methods.gradient.terms import AnswerTerm, KeepTerm, continued
from knowedit.methods.gradient.trainable import NAME, WholeWeights, linear_names
from knowedit.methods.session import Session
from knowedit.models.editable import EditableModel
from knowedit.models.fingerprint import WeightsWatch, weights_fingerprint
from knowedit.models.tokens import Row

FACTS = [
    Fact(prompt="The capital of {} is", subject="France", target="Lyon", true="Paris"),
    Fact(
        prompt="The language of {} is",
        subject="Brazil",
        target="Norse",
        true="Old",
        paraphrases=("In Brazil they speak",),
    ),
    Fact(
        prompt="They say {} plays the",
        subject="Miles Davis",
        target="sax",
        neighbours=(Probe("Ada plays the", "oboe"),),
    ),
]
CONTEXT = ("The sea is wet.", "A door is green", "Snow falls.", "We walk home in the rain.")
QUICK = {
    FineTuning: FineTuning(steps=4, lr=1e-3),
    FTL: FTL(steps=4, lr=1e-2, layers=(1,)),
    LoRA: LoRA(steps=4, lr=1e-2),
    RegularisedLoRA: RegularisedLoRA(steps=3, lr=1e-2, stable=CONTEXT[:2]),
    KLFineTuning: KLFineTuning(steps=3, lr=1e-3, context=CONTEXT),
    KLLoRA: KLLoRA(steps=3, lr=1e-2, context=CONTEXT),
}


def cast(model, dtype):
    """The same model in another precision."""
    return EditableModel(copy.deepcopy(model.hf).to(dtype), model.tokenizer, name=str(dtype))


def said(hf, model, facts):
    """Mean over the facts of the mean NLL of their answers, each text alone: the definition."""
    losses = []
    for fact in facts:
        row = model.row(fact.text, answer=fact.target)
        ids = torch.tensor([row.ids])
        losses.append(
            F.cross_entropy(hf(input_ids=ids).logits[0, row.answer - 1 : -1], ids[0, row.answer :])
        )
    return torch.stack(losses).mean()


def naive(model, facts, names, steps, lr, bound=None):
    """`{name: change}` of AdamW on a copy of the model, clamped to the bound after each step."""
    hf = copy.deepcopy(model.hf)
    start = {name: weight for name, weight in model.hf.named_parameters() if name in names}
    trained = {
        name: weight.requires_grad_() for name, weight in hf.named_parameters() if name in names
    }
    optimiser = torch.optim.AdamW(trained.values(), lr=lr, weight_decay=0.0)
    for _ in range(steps):
        optimiser.zero_grad()
        said(hf, model, facts).backward()
        optimiser.step()
        for name, weight in trained.items() if bound is not None else ():
            weight.data.copy_(
                torch.minimum(
                    torch.maximum(weight, start[name] - bound), start[name] + bound
                ).detach()
            )
    return {name: (weight - start[name]).detach() for name, weight in trained.items()}


class TestAgainstNaiveLoops:
    def test_fine_tuning(self, tiny):
        """Every weight, tied ones once; in float64, as Adam makes steps of rounding errors where a
        gradient is zero.
        """
        tiny = cast(tiny, torch.float64)
        made = FineTuning(steps=3, lr=1e-3, stop=None).compute(tiny, FACTS, progress=False)
        names = [name for name, _ in tiny.hf.named_parameters()]
        wanted = naive(tiny, FACTS, names, 3, 1e-3)
        assert set(made.changes) == set(names) and made.report.steps == 3
        for name, change in wanted.items():
            assert (made.changes[name].delta - change).norm() <= 1e-6 * change.norm() + 1e-9, name
        copied = copy.deepcopy(tiny.hf)
        for name, weight in copied.named_parameters():
            weight.data += made.changes[name].delta
        assert float(said(copied, tiny, FACTS)) == pytest.approx(
            made.report.details["loss"], rel=1e-6
        )

    def test_ftl_is_projected_after_every_step(self, tiny):
        name, bound, tiny = tiny.layout.weight_name(1), 0.012, cast(tiny, torch.float64)
        made = FTL(steps=5, lr=4e-3, layers=(1,), bound=bound, stop=None).compute(
            tiny, FACTS, progress=False
        )
        assert set(made.changes) == {name}
        wanted = naive(tiny, FACTS, [name], 5, 4e-3, bound)[name]
        found = made.changes[name].delta
        assert float(found.abs().max()) <= bound
        at_the_bound = float((found.abs() > 0.999 * bound).double().mean())
        assert 0.1 < at_the_bound < 0.99 and (found - wanted).norm() <= 1e-6 * wanted.norm()
        free = FTL(steps=5, lr=4e-3, layers=(1,), bound=1.0, stop=None).compute(
            tiny, FACTS, progress=False
        )
        assert (free.changes[name].delta - wanted).norm() > 0.1 * wanted.norm()

    def test_ftl_takes_its_bound_from_the_weights(self, tiny):
        rms = float(tiny.weight(2).square().mean().sqrt())
        made = FTL(steps=2, lr=1.0, layers=(2,), share=0.05, stop=None).compute(
            tiny, FACTS, progress=False
        )
        change = made.changes[tiny.layout.weight_name(2)].delta
        assert float(change.abs().max()) == pytest.approx(0.05 * rms, rel=1e-5)

    def test_kl_is_the_definition_at_every_token(self, tiny):
        names = [tiny.layout.weight_name(1)]
        term = KeepTerm(tiny, [tiny.row(text) for text in CONTEXT], budget=40)
        part = WholeWeights(tiny, names)
        with torch.no_grad():
            part.leaves[names[0]] += 0.1 * torch.randn(
                part.leaves[names[0]].shape, generator=torch.Generator().manual_seed(1)
            )
        found = {}
        for batch in term.evaluate(part, [3, 0, 1]):
            found |= dict(zip(batch.texts, batch.loss))
        edited = copy.deepcopy(tiny.hf)
        edited.get_parameter(names[0]).data.copy_(part.leaves[names[0]].detach())
        for i in (0, 1, 3):
            ids = torch.tensor([tiny.row(CONTEXT[i]).ids])
            clean, now = (
                hf(input_ids=ids).logits[0].double().log_softmax(-1) for hf in (tiny.hf, edited)
            )
            wanted = F.kl_div(now, clean, reduction="none", log_target=True).sum(-1).mean()
            assert (
                float(found[i]) == pytest.approx(float(wanted), rel=1e-4) and float(wanted) > 1e-3
            )
        sum(found.values()).backward()
        assert part.leaves[names[0]].grad.abs().sum() > 0

    def test_leads_are_the_worst_tokens(self, tiny_llama):
        rows = [tiny_llama.row(fact.text, answer=fact.target) for fact in FACTS]
        (found,) = AnswerTerm(tiny_llama, rows).evaluate(WholeWeights(tiny_llama, []), range(3))
        for i, row in zip(found.texts, [rows[i] for i in found.texts]):
            logits = tiny_llama.hf(input_ids=torch.tensor([row.ids])).logits[0]
            leads = []
            for place in range(row.answer, len(row.ids)):
                others = logits[place - 1].clone()
                others[row.ids[place]] = -torch.inf
                leads.append(float(logits[place - 1][row.ids[place]] - others.max()))
            assert float(found.lead[found.texts.index(i)]) == pytest.approx(min(leads), abs=1e-4)

    def test_stability_keeps_the_models_own_words(self, tiny_llama):
        rows = continued(tiny_llama, ["The sea is", Probe("The sky is", "blue")], 4)
        own = next(row for row in rows if row.ids[: row.answer] == tiny_llama.row("The sea is").ids)
        greedy = tiny_llama.hf(input_ids=torch.tensor([own.ids])).logits[0].argmax(-1)
        assert (
            greedy[own.answer - 1 : -1].tolist() == own.ids[own.answer :]
            and len(own.ids) - own.answer == 4
        )
        assert tiny_llama.row("The sky is", answer="blue") in rows


class TestAdapters:
    @pytest.mark.parametrize("modules", [None, ("down_proj", "c_proj")])
    def test_the_edit_is_pefts_merged_weight(self, tiny, tmp_path, modules):
        from peft import PeftModel

        known = [
            name
            for name in modules or ()
            if any(name in full for full, _ in tiny.hf.named_modules())
        ]
        method = LoRA(
            steps=4, lr=1e-2, rank=3, alpha=5, modules=tuple(known) if modules else None, stop=None
        )
        with method.part(tiny) as part:
            descend(method, part, method.terms(tiny, FACTS), False)
            merged = {
                f"{name}.weight": layer.get_delta_weight(NAME)
                for name, layer in part.layers.items()
            }
            ids = torch.tensor([tiny.row(FACTS[0].text).ids])
            trained = tiny.hf(input_ids=ids).logits
        made = method.compute(tiny, FACTS, progress=False)
        assert set(made.changes) == set(merged) and made.report.details["trainable"] == part.size
        for name, change in made.changes.items():
            left, right = change.U, change.V
            assert left.shape[1] == right.shape[1] == 3
            delta = left @ right.T
            delta = delta.T if tiny.layout.transposed else delta
            assert (delta - merged[name]).norm() <= 1e-6 * merged[name].norm()
        with made.applied_to(tiny):
            applied = tiny.hf(input_ids=ids).logits
        torch.testing.assert_close(applied, trained, rtol=1e-4, atol=1e-4)
        made.export(tmp_path / "adapter", tiny)
        wrapped = PeftModel.from_pretrained(copy.deepcopy(tiny.hf), tmp_path / "adapter")
        torch.testing.assert_close(wrapped(input_ids=ids).logits, applied, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(tiny.hf(input_ids=ids).logits, applied, atol=1e-3)

    def test_modules_are_found_by_structure(self, tiny):
        names = linear_names(tiny, (1,), None)
        inside = {name.rpartition(".")[2] for name in names}
        llama = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        assert inside == ({"c_attn", "c_proj", "c_fc"} if tiny.layout.transposed else llama)
        assert all(name.startswith(f"{tiny.layout.layers}.1.") for name in names)
        assert len(linear_names(tiny, None, None)) == len(tiny.layers) * len(names)

    def test_an_adapter_of_the_user_stays_as_it_was(self, tiny_llama):
        from peft import LoraConfig, LoraModel

        hf = tiny_llama.hf
        mine = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        LoraModel(hf, mine, "default")
        config = hf.peft_config = {"default": hf.peft_config["default"]}
        names = [name for name, _ in hf.named_modules()]
        trained = {name for name, leaf in hf.named_parameters() if leaf.requires_grad}
        before, hf.training = weights_fingerprint(hf), True
        ids = torch.tensor([tiny_llama.row(FACTS[0].text).ids])
        spoken = hf(input_ids=ids).logits
        method = replace(QUICK[LoRA], modules=("down_proj",))
        made = method.compute(tiny_llama, FACTS, progress=False)
        assert all(name.endswith("down_proj.weight") for name in made.changes)
        assert torch.equal(hf(input_ids=ids).logits, spoken)  # it is still switched on
        assert all(leaf.grad is None for leaf in hf.parameters())
        with made.applied_to(tiny_llama):  # and was, while the edit was trained
            assert float(said(hf, tiny_llama, FACTS)) == pytest.approx(
                made.report.details["loss"], rel=1e-3
            )
        assert hf.peft_config is config and list(config) == ["default"] and hf.training
        assert [name for name, _ in hf.named_modules()] == names
        assert {name for name, leaf in hf.named_parameters() if leaf.requires_grad} == trained
        assert all("lora_" in name for name in trained) and len(trained) == 2 * len(hf.model.layers)
        assert weights_fingerprint(hf) == before


@pytest.mark.parametrize("kind", QUICK, ids=lambda kind: kind.name)
class TestEveryMethod:
    def test_it_learns_and_leaves_the_model_alone(self, tiny, kind):
        before, names = weights_fingerprint(tiny.hf), [name for name, _ in tiny.hf.named_modules()]
        start = float(said(tiny.hf, tiny, FACTS))
        made = QUICK[kind].compute(tiny, FACTS, progress=False)
        assert (
            weights_fingerprint(tiny.hf) == before
            and [name for name, _ in tiny.hf.named_modules()] == names
        )
        assert not any(weight.requires_grad for weight in tiny.hf.parameters()) and not hasattr(
            tiny.hf, "peft_config"
        )
        assert not tiny.hf.training and not tiny.ledger.active
        report = made.report.to_dict()
        assert (
            report["loss"] < start
            and report["seconds"] > 0
            and report["steps"] <= QUICK[kind].steps
        )
        matrices = {name for name, weight in tiny.hf.named_parameters() if weight.ndim == 2}
        assert (
            set(report["relative_norm"]) == set(made.changes) & matrices
            and max(report["relative_norm"].values()) > 0
        )
        assert 0 < report["trainable"] <= sum(weight.numel() for weight in tiny.hf.parameters())
        with made.applied_to(tiny):
            assert float(said(tiny.hf, tiny, FACTS)) == pytest.approx(report["loss"], rel=1e-3)
            for name, norm in total_norms(tiny, [made]).items():
                assert norm == pytest.approx(report["relative_norm"][name], rel=1e-3)
        assert weights_fingerprint(tiny.hf) == before

    def test_bfloat16_is_trained_in_float32_and_undone_to_the_bit(self, tiny_llama, kind):
        model = cast(tiny_llama, torch.bfloat16)
        before, start = weights_fingerprint(model.hf), float(said(model.hf, model, FACTS))
        made = QUICK[kind].compute(model, FACTS, progress=False)
        parts = [part for change in made.changes.values() for part in change.tensors().values()]
        assert all(part.dtype == torch.float32 for part in parts)
        assert any(not part.equal(part.bfloat16().float()) for part in parts)
        made.apply(model)
        assert (
            weights_fingerprint(model.hf) != before and float(said(model.hf, model, FACTS)) < start
        )
        made.undo(model)
        assert weights_fingerprint(model.hf) == before

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_nothing_is_left_after_an_interruption(self, tiny_llama, kind, error, monkeypatch):
        before, steps = weights_fingerprint(tiny_llama.hf), []

        def interrupted(optimiser, *_args, **_kwargs):
            steps.append(1)
            raise error

        monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(error):
            QUICK[kind].compute(tiny_llama, FACTS, progress=False)
        assert (
            steps
            and weights_fingerprint(tiny_llama.hf) == before
            and not hasattr(tiny_llama.hf, "peft_config")
        )
        assert not any(weight.requires_grad for weight in tiny_llama.hf.parameters())
        assert not any("lora" in name for name, _ in tiny_llama.hf.named_modules())

    def test_a_loss_that_is_not_finite_stops_it(self, tiny_llama, kind):
        before = weights_fingerprint(tiny_llama.hf)
        wild = replace(QUICK[kind], lr=1e37, steps=9, **({"bound": 1e38} if kind is FTL else {}))
        with pytest.raises(
            EditError,
            match=r"loss of the \w+ is (nan|inf) at step \d of 9; .*lower lr \(now 1e\+37\)",
        ):
            wild.compute(tiny_llama, FACTS, progress=False)
        assert weights_fingerprint(tiny_llama.hf) == before

    def test_a_seed_gives_the_same_bits(self, tiny_llama, kind):
        method = replace(QUICK[kind], batch=2, draw=2, stop=None)
        one, two = (method.compute(tiny_llama, FACTS, progress=False) for _ in range(2))
        assert (
            one.key
            == two.key
            != replace(method, seed=1).compute(tiny_llama, FACTS, progress=False).key
        )

    def test_it_reads_back_from_a_file(self, tiny_llama, kind, tmp_path):
        made = QUICK[kind].compute(tiny_llama, FACTS, progress=False)
        read = Edit.load(made.save(tmp_path / "edit.safetensors"))
        said = describe(tmp_path / "edit.safetensors").text
        assert made.key in said and (f"and {len(made.changes) - 12} more weights" in said) == (
            len(made.changes) > 12
        )
        assert read.key == made.key and read.report.details["settings"]["seed"] == 0
        with made.applied_to(tiny_llama):
            applied = weights_fingerprint(tiny_llama.hf)
        with read.applied_to(tiny_llama):
            assert weights_fingerprint(tiny_llama.hf) == applied


class TestRegularisation:
    def test_kl_drifts_less_at_the_same_loss(self, tiny_llama):
        """The facts rest at the same loss in every method; what the others move on held-out text,
        KL does not.
        """
        elsewhere = ["The sea was calm", "Green doors are", "It snows and we", "They went home"]
        clean, drifts = tiny_llama.next_logprobs(elsewhere), {}
        for method in (LoRA, KLLoRA, RegularisedLoRA):
            settings = (
                {"kl": 10.0, "context": (*CONTEXT, "Doors can be green.", "It rains.")}
                if method is KLLoRA
                else {}
            )
            settings |= (
                {"stability": 1.0, "stable": CONTEXT[:2]} if method is RegularisedLoRA else {}
            )
            made = method(steps=60, lr=3e-3, stop=0.3, **settings).compute(
                tiny_llama, FACTS[:1], progress=False
            )
            assert 0.15 < made.report.details["loss"] < 0.4, method.name
            with made.applied_to(tiny_llama):
                now = tiny_llama.next_logprobs(elsewhere)
            drifts[method.name] = float((clean.exp() * (clean - now)).sum(-1).mean())
        assert drifts["KL-LoRA"] < 0.7 * drifts["LoRA"], drifts

    def test_shipped_texts_are_about_others(self, tiny_llama):
        terms = replace(QUICK[KLLoRA], context=None, stability=1.0).terms(tiny_llama, FACTS)
        assert list(terms) == ["answers", "stability", "kl"] and terms["kl"].weight == 5.0
        texts = [
            tiny_llama.tokenizer.decode(row.ids)
            for term in (terms["stability"], terms["kl"])
            for row in term.rows
        ]
        assert len(texts) > 100 and not any(
            "France" in text or "Brazil" in text or "Miles" in text for text in texts
        )

    def test_every_text_is_drawn_before_any_comes_again(self, tiny_llama):
        term = AnswerTerm(tiny_llama, [Row([1, 2], answer=1)] * 7, draw=3)
        drawn = [text for step in range(7) for text in term.drawn(step, 5)]
        assert all(sorted(drawn[start : start + 7]) == list(range(7)) for start in (0, 7, 14))
        assert len({tuple(drawn[start : start + 7]) for start in (0, 7, 14)}) == 3
        assert [len(term.drawn(step, 5)) for step in range(4)] == [3] * 4


class TestStopping:
    def test_when_the_answers_are_good_enough(self, tiny_llama):
        by_loss = (
            LoRA(steps=200, lr=1e-2, stop=0.5, batch=2)
            .compute(tiny_llama, FACTS, progress=False)
            .report
        )
        assert by_loss.steps < 200 and by_loss.details["loss"] < 0.7
        by_lead = LoRA(steps=200, lr=1e-2, stop=None, margin=1.0).compute(
            tiny_llama, FACTS, progress=False
        )
        assert (
            by_lead.report.steps < 200
            and by_lead.report.details["lead"] >= 1.0
            and all(warning.startswith("RUINOUS") for warning in by_lead.warnings)
        )
        for fact in FACTS:
            with by_lead.applied_to(tiny_llama):
                assert tiny_llama.score([fact.text], [fact.target])[0].exact
        never = LoRA(steps=3, lr=1e-6, stop=None).compute(tiny_llama, FACTS, progress=False)
        assert never.report.steps == 3 and any(
            "comes first" in warning for warning in never.warnings
        )

    def test_resting_facts_are_not_trained_on(self, tiny_gpt2):
        """Then KL alone is left, whose gradient is zero (in float64: nearly) as long as nothing has
        changed.
        """
        exact, moved = cast(tiny_gpt2, torch.float64), {}
        for stop in (1e9, None):
            method = KLFineTuning(steps=1, lr=1e-3, stop=stop, context=CONTEXT)
            made = method.compute(exact, FACTS, progress=False)
            assert made.report.steps == 1
            moved[stop] = max(float(change.delta.abs().max()) for change in made.changes.values())
        assert moved[1e9] < 1e-9 and moved[None] == pytest.approx(1e-3, rel=1e-3)

    def test_not_before_every_fact_was_seen(self, tiny_llama):
        easy = replace(FACTS[0], target=tiny_llama.generate([FACTS[0].text], 1)[0].strip() or "x")
        report = (
            LoRA(steps=9, lr=1e-6, stop=1e9, batch=1)
            .compute(tiny_llama, [easy, *FACTS[1:]], progress=False)
            .report
        )
        assert report.steps == 2  # the third fact is drawn at step 2


class TestInSequence:
    @pytest.mark.parametrize("kind", [FineTuning, LoRA], ids=lambda kind: kind.name)
    def test_each_batch_starts_from_the_edited_model(self, tiny_llama, kind, tmp_path):
        before = weights_fingerprint(tiny_llama.hf)
        with Session(QUICK[kind], tiny_llama) as session:
            first = session.write(FACTS[:1], force=True, progress=False)
            alone = QUICK[kind].compute(tiny_llama, FACTS[1:2], progress=False)
            second = session.write(FACTS[1:2], force=True, progress=False)
            assert second.key == alone.key and second.key != first.key
            written = weights_fingerprint(tiny_llama.hf)
            with pytest.raises(FactError, match="contradicts"):
                session.write([replace(FACTS[0], target="Nice")], force=True, progress=False)
            read = History.load(session.history.save(tmp_path / "history.safetensors"))
        assert weights_fingerprint(tiny_llama.hf) == before
        assert QUICK[kind].compute(tiny_llama, FACTS[1:2], progress=False).key != second.key
        read.replay(tiny_llama)
        assert weights_fingerprint(tiny_llama.hf) == written and [
            edit.key for edit in read.edits
        ] == [first.key, second.key]

    def test_a_fingerprint_must_have_been_taken(self, tiny_llama):
        made = QUICK[LoRA].compute(tiny_llama, FACTS, progress=False)
        with made.applied_to(tiny_llama):
            known, tiny_llama._state.weights = tiny_llama._state.weights, WeightsWatch()
            with pytest.raises(EditError, match="undo the edit first"):
                QUICK[LoRA].compute(tiny_llama, FACTS, progress=False)
            tiny_llama._state.weights = known

    @pytest.mark.parametrize("protocol", ["batch", "single", "sequential"])
    def test_every_protocol_without_statistics(self, tiny_llama, protocol):
        before = weights_fingerprint(tiny_llama.hf)
        baseline = Baseline(tiny_llama, FACTS, progress=False)
        method = LoRA(steps=2)
        found = run(baseline, None, method, protocol, batch=2, every=2, progress=False)
        assert found.method == "LoRA" and found.seconds > 0 and found.report["trainable"] > 0
        assert (
            found.evaluation.after["efficacy"]["magnitude"]
            != found.evaluation.before["efficacy"]["magnitude"]
        )
        assert str(found) and found.to_dict()["report"]["steps"] == 2
        assert (
            len(found.trajectory) == (3 if protocol == "sequential" else 0)
            and weights_fingerprint(tiny_llama.hf) == before
        )

    def test_single_edits_are_made_when_they_are_asked_for(self, tiny_llama):
        edits = iter(QUICK[LoRA].compute_each(tiny_llama, FACTS))
        first = next(edits)
        assert first.facts == FACTS[:1] and [edit.facts for edit in edits] == [
            [fact] for fact in FACTS[1:]
        ]


class TestBadInput:
    @pytest.mark.parametrize(
        "method, message",
        [
            (
                LoRA(modules=("q_projection",)),
                "no linear layers q_projection: .*self_attn.q_proj, .*mlp.down_proj",
            ),
            (LoRA(layers=()), "name at least one layer"),
            (FineTuning(layers=()), "layers is empty"),
            (FTL(layers=(1, 2)), "FT-L trains one layer, got \\[1, 2\\]"),
            (KLLoRA(context=()), "no texts to train on"),
            (RegularisedLoRA(stable=()), "no texts to train on"),
            (KLLoRA(context=("The sea", "")), "the text '' has no tokens"),
        ],
    )
    def test_settings_that_do_not_fit_the_model(self, tiny_llama, method, message):
        with pytest.raises(EditError, match=message):
            method.compute(tiny_llama, FACTS, progress=False)

    def test_layers_that_are_not_there(self, tiny_llama):
        for method in (LoRA(layers=(9,)), FineTuning(layers=(9,)), FTL(layers=(9,))):
            with pytest.raises(ModelError, match="layer 9 does not exist"):
                method.compute(tiny_llama, FACTS, progress=False)

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"rank": 0}, "lora.rank must be at least 1, got 0"),
            ({"alpha": -1}, "lora.alpha must be positive"),
            ({"steps": 0}, "lora.steps must be at least 1"),
            ({"lr": 0.0}, "lora.lr must be positive and finite, got 0.0"),
            ({"lr": float("nan")}, "lora.lr must be positive and finite, got nan"),
            ({"batch": 0}, "lora.batch must be at least 1"),
            ({"draw": 0}, "lora.draw must be at least 1"),
            ({"kl": -1.0}, "lora.kl must not be negative"),
        ],
    )
    def test_settings_that_cannot_be(self, settings, message):
        with pytest.raises(EditError, match=message):
            LoRA(**settings)
        with pytest.raises(EditError, match="ft-l.bound must be positive"):
            FTL(bound=-1.0)

    def test_facts_that_cannot_be_written(self, tiny_llama):
        with pytest.raises(EditError, match="no facts"):
            QUICK[LoRA].compute(tiny_llama, [])
        with pytest.raises(EditError, match="rank of 1000000000 is more than the widest matrix"):
            replace(QUICK[LoRA], rank=10**9).compute(tiny_llama, FACTS)
        with pytest.raises(FactError, match="target is empty"):
            replace(FACTS[0], target=" ")
        with pytest.raises(FactError, match="contradicts"):
            QUICK[LoRA].compute(tiny_llama, [FACTS[0], replace(FACTS[0], target="Nice")])

    def test_names_of_the_command_line(self):
        names = {"ft", "ft-l", "lora", "regularised-lora", "kl-ft", "kl-lora"}
        assert {kind.kind for kind in QUICK} == names
        assert all(
            isinstance(QUICK[kind], GradientMethod) and not kind.needs_statistics for kind in QUICK
        )
        with pytest.raises(ConfigError, match="lora.steps must be a whole number"):
            LoRA(steps="many")


def test_the_peak_is_seen_after_it_is_over():
    with peak_memory(torch.device("cpu")) as peak:
        block = torch.ones(60_000_000)
        del block
        found = peak()
    assert found is not None and 200e6 < found < 400e6
