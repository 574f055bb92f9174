"""EditableModel: a causal LM with what editing needs - tokens with a subject in them, the MLP keys
and layer outputs at chosen tokens, log-probabilities of answers, and edits that can be taken back
bit for bit.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from numbers import Integral
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from knowedit.errors import EditError, ModelError
from knowedit.io.progress import Within
from knowedit.models import beside, generation, partial
from knowedit.models.evaluating import evaluating, plain_modes
from knowedit.models.experts import Routed, WideProjection, as_keys, split_name
from knowedit.models.fingerprint import WeightsWatch, setup_of
from knowedit.models.generation import Router, Score
from knowedit.models.probing import probe_ids, rounding, run, states_of
from knowedit.models.processor import free_memory, has_bf16_units
from knowedit.models.samples import samples
from knowedit.models.selfcheck import (
    Checkup,
    check_head,
    check_parts,
    put_around,
    remember,
    remembered,
)
from knowedit.models.structure import Layout, Which, detect, is_transposed, own_head
from knowedit.models.tokens import (
    Row,
    batches,
    check_embedded,
    check_tokenizer,
    check_vocabulary,
    tokenise,
)
from knowedit_kernels import WeightLedger
from knowedit_kernels.lowrank import Change

#: Which outputs to read beside the keys: none, a layer's, or its MLP projection's.
Outputs = bool | Literal["projection"]


class _InForce:
    """What is known of one transformers model, whoever wraps it: the ledger of its edits, the
    router, what is known of the unedited weights, the tokenizer.
    """

    def __init__(self) -> None:
        self.ledger = WeightLedger()
        self.router: Router | None = None
        self.weights = WeightsWatch()
        self.tokenizer: Any = None
        self.kinds: list[tuple[Any, ...]] | None = None  # of parameters, when it was checked
        self.checkup: Checkup | None = None
        self.exclusive: dict[str, frozenset[str]] = {}  # by the key of the edit
        self.told: dict[object, tuple[str, Any]] = {}


logger = logging.getLogger(__name__)

_IN_FORCE: WeakKeyDictionary[nn.Module, _InForce] = WeakKeyDictionary()


def inside(hf: Any) -> Any:
    """The transformers model in what `torch.compile` made of it, whose weights are the same;
    anything else as it is.
    """
    return getattr(hf, "_orig_mod", hf)


def known_tokenizer(hf: nn.Module) -> Any:
    """The tokenizer that a transformers model was wrapped with before, or None."""
    hf = inside(hf)
    return _IN_FORCE[hf].tokenizer if hf in _IN_FORCE else None


def _known(hf: Any) -> _InForce:
    """What is known of a transformers model, without what was found for parameters of other kinds.
    Raises ModelError for anything else.
    """
    if not isinstance(hf, nn.Module) or not hasattr(hf, "config"):
        raise ModelError(f"{type(hf).__name__} is not a Hugging Face transformers model")
    state, kinds = _IN_FORCE.get(hf) or _InForce(), _kinds(hf)
    if state.kinds != kinds:
        state.kinds, state.checkup = kinds, None
    return state


def _kinds(hf: nn.Module) -> list[tuple[Any, ...]]:
    """What a layout is found for: parameters of these names, classes, dtypes and shapes, and what
    was put around the code of the modules.
    """
    parameters = [(name, type(p.data), p.dtype, p.shape) for name, p in hf.named_parameters()]
    return [*parameters, *put_around(hf)]


class EditableModel:
    """A transformers causal LM and its tokenizer, ready to be edited.

    The transformers model is left as it is found: its parameters stay trainable and its mode stays;
    whatever is run here is run within `evaluating()`. Two of these around one transformers model
    see the same edits.

    Attributes:
        hf: the transformers model.
        tokenizer: its fast tokenizer.
        layout: where the edited projections are (`structure.Layout`).
        name: as given to `load_model`; a copy's own (`knowedit.models.copies`).
        experts: which experts `layout` is about (`editing`).

    Raises:
        ModelError: the model cannot be edited, with the reason.
    """

    @plain_modes()
    def __init__(self, hf: Any, tokenizer: Any, *, name: str | None = None) -> None:
        check_tokenizer(tokenizer)
        hf = inside(hf)
        state = _known(hf)
        earlier = state.checkup or remembered(hf)
        self.layout: Layout = earlier.layout if earlier else detect(hf)
        self.hf, self.tokenizer = hf, tokenizer
        check_vocabulary(tokenizer, min(self.vocabulary, self.sayable))
        self.experts: Which = "routed"
        self.name = name or getattr(hf.config, "_name_or_path", "") or type(hf).__name__
        if self.dtype == torch.float16 and self.device.type == "cpu":
            raise ModelError(
                "float16 matrix products are ~100x slower than float32 on a CPU; load with "
                "dtype='float32'"
            )
        names = {
            self.layout.weight_name(i): self.weight(i)
            for i in self.layout.editable
            if self.layout.experts(i) is None
        }
        self._state, state.tokenizer = state, tokenizer
        if not state.ledger.active:  # weights and dtype may be others than when it was last wrapped
            transposed = names if self.layout.transposed else ()
            state.ledger, state.weights = WeightLedger(names, transposed=transposed), WeightsWatch()
        self._evaluating = False
        if state.checkup is None:
            state.checkup = self._checked(earlier)
        _IN_FORCE[hf] = state

    def _checked(self, earlier: Checkup | None) -> Checkup:
        """Try the parts against the plain model; only the head where the rest is known. Raises
        ModelError.
        """
        head = check_head(self)
        if earlier is not None:
            return earlier
        replays, others = check_parts(self)
        found = Checkup(self.layout, replays, (head, *others))
        remember(self.hf, found)
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> EditableModel:
        """A copy of the transformers model, too, with the same edits in force."""
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        for name, value in vars(self).items():
            setattr(made, name, copy.deepcopy(value, memo))
        # an expert's matrix is a part of its parameter, and a copy of the part alone is not
        ledger = made.ledger
        parts = [name for name in ledger.edited if split_name(name)[1] is not None]
        ledger.adopt({name: made.stored(name) for name in parts})
        _IN_FORCE[made.hf] = made._state
        return made

    def __repr__(self) -> str:
        parameters = sum(p.numel() for p in self.hf.parameters())
        applied = ", ".join(self.ledger.active) or "none"
        return (
            f"EditableModel({self.name!r}: {type(self.hf).__name__}, "
            f"{parameters / 1e6:,.1f} M parameters, {self.dtype}, {self.device}\n"
            f"  {len(self.layers)} layers, hidden {self.hidden}, d_ff {self.d_ff}; "
            f"edits go to {self.layout.pattern.replace('{}', '{layer}')}\n"
            f"  edits in force: {applied if len(applied) < 200 else applied[:200] + ' ...'})"
        )

    def editing(self, experts: Which) -> EditableModel:
        """The same transformers model, with the same edits, seen with other experts as the
        projections that are edited: "routed", the "shared" one that every token passes, or "both"
        as one projection, whose key is the routed ones' and then the shared one's.

        Raises:
            EditError: it has no such experts.
        """
        if experts == self.experts:
            return self
        seen = copy.copy(self)
        seen.experts, seen.layout = experts, self.checkup.layout.of(experts)
        return seen

    def running(self, hf: nn.Module) -> EditableModel:
        """The same, asked through another transformers model with the same modules (quantised ones,
        say, that cannot be edited).
        """
        seen = copy.copy(self)
        seen.hf = hf
        return seen

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within the block the transformers model is in evaluation mode and its parameters are
        frozen; afterwards both are as they were found.
        """
        if self._evaluating:
            yield
            return
        self._evaluating = True
        try:
            with evaluating(self.hf):
                yield
        finally:
            self._evaluating = False

    # -- what it is
    # ---------------------------------------------------------------------------------------------

    @property
    def ledger(self) -> WeightLedger:
        """The edits of weights in force."""
        return self._state.ledger

    @property
    def router(self) -> Router | None:
        """Sends some prompts to another model (SERAC's edits register one); see
        `generation.Router`.
        """
        return self._state.router

    @router.setter
    def router(self, router: Router | None) -> None:
        self._state.router = router

    @property
    def exclusive(self) -> dict[str, frozenset[str]]:
        """What edits have for themselves (`Edit.exclusive`), by the key of the edit;
        `ledger.active` says which are in force.
        """
        return self._state.exclusive

    @property
    def told(self) -> dict[object, tuple[str, Any]]:
        """What edits say: the key of the edit and the fact, by what is asked for (`asked_for`);
        `ledger.active` says which are in force.
        """
        return self._state.told

    @property
    def layers(self) -> nn.ModuleList:
        return self.hf.get_submodule(self.layout.layers)

    @property
    def base(self) -> nn.Module:
        """What turns tokens into final hidden states: the model without its head."""
        return self.hf.get_submodule(self.layout.base)

    @property
    def norm(self) -> nn.Module:
        """What stands between the last layer and the head. Raises ModelError when that is not one
        module.
        """
        if self.layout.norm is None:
            raise ModelError(
                f"{self.name}: what follows its last layer is not one norm, and cannot be run alone"
            )
        return self.hf.get_submodule(self.layout.norm) if self.layout.norm else nn.Identity()

    def finish(self, outputs: Tensor) -> Tensor:
        """Final hidden states `[B, T, hidden]` of the last layer's outputs `[.., B, T, hidden]`."""
        return partial.finished(self, outputs) if self.layout.norm is None else self.norm(outputs)

    @property
    def replays(self) -> bool:
        """Whether layers can be run one by one with the results of the whole model; otherwise the
        whole model is run, which is slower.
        """
        return self.checkup.replays

    @property
    def checkup(self) -> Checkup:
        """What was tried when it was opened."""
        if self._state.checkup is None:  # while it is being opened
            return Checkup(self.layout, False, ())
        return self._state.checkup

    @property
    def source(self) -> str:
        """Where transformers finds the weights: a hub id or a folder; the model's name when it was
        made and not loaded.
        """
        return getattr(self.hf, "name_or_path", "") or self.name

    @property
    def d_ff(self) -> int:
        """Size of the widest layer's key; `layout.width(layer)` is a layer's own."""
        return self.layout.d_ff

    @property
    def hidden(self) -> int:
        return self.layout.hidden

    @property
    def dtype(self) -> torch.dtype:
        return self.weight(self.layout.editable[0]).dtype

    @property
    def device(self) -> torch.device:
        return self.hf.get_input_embeddings().weight.device

    @property
    def vocabulary(self) -> int:
        """How many tokens the model embeds; the tokenizer may know more, or fewer."""
        return int(self.hf.get_input_embeddings().weight.shape[0])

    @property
    def sayable(self) -> int:
        """How many tokens it has logits for."""
        return int(self.hf.get_output_embeddings().weight.shape[0])

    @property
    def rounding(self) -> float:
        """The relative difference below which two of its results are the same: that of the coarsest
        of its dtypes.
        """
        return max(rounding(parameter.dtype) for parameter in self.hf.parameters())

    @property
    def max_length(self) -> int:
        """Longest sequence the model was made for, in tokens."""
        config = self.hf.config
        return int(
            getattr(config, "max_position_embeddings", 0)
            or getattr(config, "n_positions", 0)
            or 1024
        )

    def projection(self, layer: int) -> nn.Module:
        """The MLP output projection of `layer`: its input is the key `[.., d_ff]`, its output the
        value. Routed experts are one wide projection.
        """
        self.check_layers([layer])
        module = self.hf.get_submodule(self.layout.projection(layer))
        experts = self.layout.experts(layer)
        return module if experts is None else WideProjection(module, experts)

    def weight(self, layer: int) -> Tensor:
        """The projection's weight as the model stores it (`[hidden, d_ff]`, or transposed for
        GPT-2; `[E, hidden, d]` for routed experts).
        """
        return self.projection(layer).weight  # type: ignore[return-value]

    def register(self, changes: Mapping[str, Change]) -> Mapping[str, Change]:
        """Make the ledger know the parameters of `changes`, which it gives back: those that the
        model has now. Matrices of experts are known each by itself.

        Raises:
            LedgerError: the model has another parameter in the place of one that is edited.
        """
        self.follow_parameters(changes)
        for name in changes:
            if name not in self.ledger:
                self.ledger.register(name, self.stored(name), transposed=self.is_transposed(name))
        return changes

    def follow_parameters(self, names: Iterable[str] = ()) -> None:
        """Let the ledger edit the parameters that the model has now: of these names, and those with
        edits in force.

        Raises:
            LedgerError: the model has another in the place of one that is edited.
            EditError: it has none there.
        """
        known = (name for name in {*names, *self.ledger.edited} if name in self.ledger)
        self.ledger.follow({name: self.stored(name) for name in known})

    def restored(self, names: Iterable[str]) -> None:
        """Parameters of these names, from which edits were taken back, have their own bits again
        where no other edit is in force: they need not be read for the fingerprint.
        """
        clean = {split_name(name)[0] for name in names} - self._edited
        self._state.weights.as_read({name: self.hf.get_parameter(name) for name in clean})

    @property
    def _edited(self) -> frozenset[str]:
        """The parameters with edits in force."""
        return frozenset(split_name(name)[0] for name in self.ledger.edited)

    def stored(self, name: str) -> Tensor:
        """A parameter, or one expert's matrix in it (`NAME[expert]`), as the model stores it.

        Raises:
            EditError: there is none of this name.
        """
        parameter, expert = split_name(name)
        try:
            found = self.hf.get_parameter(parameter)
            return found if expert is None else found.detach()[expert]
        except (AttributeError, IndexError):
            raise EditError(f"{self.name} has no parameter {name}") from None

    def is_transposed(self, name: str) -> bool:
        """Whether a matrix is stored `[in, out]`: GPT-2's, or an expert's of a layer that is known
        to hold them like this.
        """
        of_expert = self.layout.transposes(name)
        return is_transposed(self.hf, name) if of_expert is None else of_expert

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raise ModelError for a layer that does not exist."""
        for layer in layers:
            if not isinstance(layer, Integral) or isinstance(layer, bool):
                raise ModelError(f"layers are whole numbers, such as [4, 5], got {layer!r}")
            if not 0 <= layer < len(self.layers):
                raise ModelError(
                    f"layer {layer} does not exist: {self.name} has layers "
                    f"0..{len(self.layers) - 1}"
                )

    @property
    def fingerprint(self) -> str:
        """Digest of all *unedited* weights (name, shape, dtype, values) as they are now; 32 hex
        digits. What was changed since it was last asked for is read again.

        Raises:
            ModelError: a weight is NaN or infinite.
            EditError: asked for the first time while an edit is applied.
        """
        return self._state.weights.fingerprint(self.hf, self._edited)

    @property
    def setup(self) -> str:
        """Digests of what the configuration computes with the weights, and of the tokenizer."""
        return setup_of(self.hf.config, self.tokenizer)

    def draft(self) -> EditableModel:
        """A copy to optimise targets on, in the dtype whose products are fastest: bfloat16 where
        the processor has units for it (a third of the time), else float32.

        Attention is the plain one on a CPU, where torch's fused backward is slow on short rows,
        unless transformers' plain code is wrong or fails for this configuration. Elsewhere a
        bfloat16 model is its own draft.
        """
        if self.dtype == torch.bfloat16 and self.device.type != "cpu":
            return self
        fastest = torch.bfloat16 if has_bf16_units(self.device) else torch.float32
        copied = self._copied(fastest)
        if self.device.type == "cpu":
            _attend_plainly(copied.hf)
        return copied

    def widened(self) -> EditableModel:
        """The model to read with: a float32 copy of a bfloat16 one on a processor without units for
        that, where a pass takes three times as long as in float32; else itself. The log says so,
        and if there is no memory for the copy.
        """
        if self.dtype != torch.bfloat16 or has_bf16_units(self.device):
            return self
        size = 4e-9 * sum(parameter.numel() for parameter in self.hf.parameters())
        what = "this CPU has no units for bfloat16"
        if 1e9 * size > 0.8 * free_memory():
            logger.warning("%s, and no %.1f GB for a float32 copy: slow passes", what, size)
            return self
        logger.warning("%s: reading with a float32 copy (%.1f GB), faster", what, size)
        return self._copied(torch.float32)

    def _copied(self, dtype: torch.dtype) -> EditableModel:
        copied = _copy(self.hf).to(dtype)
        copied.eval().requires_grad_(False)
        known = _IN_FORCE[copied] = _InForce()
        known.kinds, known.checkup = _kinds(copied), self.checkup
        return EditableModel(copied, self.tokenizer, name=self.name).editing(self.experts)

    # -- text to tokens
    # -----------------------------------------------------------------------------------------

    def row(self, prompt: str, subject: str | None = None, answer: str | None = None) -> Row:
        """Tokenise `prompt` (+ `answer`) and find the last token of `subject`; see
        `tokens.tokenise`.
        """
        return tokenise(
            self.tokenizer,
            prompt,
            subject,
            answer,
            longest=self.max_length,
            vocabulary=self.vocabulary,
            sayable=self.sayable,
        )

    def chat(self, message: str, answer_prefix: str = "") -> str:
        """The text of a one-turn chat with `message`, up to where the answer starts.

        Raises:
            ModelError: the tokenizer has no chat template.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise ModelError(f"{self.name} has no chat template")
        turn = [{"role": "user", "content": message}]
        text = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        first = self.tokenizer.bos_token
        if first and self.tokenizer("").input_ids[:1] == [self.tokenizer.bos_token_id]:
            text = text.removeprefix(first)  # `row` puts it in front
        return text + answer_prefix

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Right-pad token lists to `ids [B, T]` and `mask [B, T]` (bool) on the model's device.

        Raises:
            EditError: a token has no embedding.
        """
        for row in rows:
            check_embedded(self.tokenizer, row, self.vocabulary)
        width = max(map(len, rows))
        fill = self.tokenizer.pad_token_id or 0
        fill = fill if fill < self.vocabulary else 0
        ids = torch.tensor([list(r) + [fill] * (width - len(r)) for r in rows], device=self.device)
        lengths = torch.tensor([len(r) for r in rows], device=self.device)
        return ids, torch.arange(width, device=self.device) < lengths[:, None]

    # -- running it
    # ---------------------------------------------------------------------------------------------

    def keys(
        self,
        rows: Sequence[Row],
        layers: Sequence[int],
        *,
        outputs: Outputs = False,
        budget: int = 4096,
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        """MLP keys at each row's subject token, for all `layers` in one pass; nothing after that
        token is run. Of routed experts they are the wide layer's (`models.experts`), and that of a
        shared expert edited with them follows, times whatever gate it has of its own.

        Args:
            outputs: also return the deepest layer's output at the token, or that of its MLP's
                projection.
            budget: padded tokens a batch.

        Returns:
            `{layer: keys [n, d_ff]}` and the outputs `[n, hidden]` or None, float32.

        Raises:
            ModelError: what stands behind a shared expert edited with the routed ones is no gate.
        """
        self.check_layers(layers)
        if any(self.layout.beside(layer) for layer in layers):
            return beside.keys(self, rows, layers, outputs=outputs, budget=budget)
        deepest, count = max(layers), len(rows)
        found = {
            layer: torch.empty(count, self.layout.width(layer), device=self.device)
            for layer in layers
        }
        out = torch.empty(count, self.hidden, device=self.device) if outputs else None
        ends = [len(r.ids) - 1 if r.subject is None else r.subject for r in rows]
        for batch in batches([e + 1 for e in ends], budget):
            take = functools.partial(_put, torch.tensor(batch))
            projections = {self.layout.projection(layer): found[layer] for layer in found}
            where = self.layout.projection if outputs == "projection" else self.layout.layer
            last = {} if out is None else {where(deepest): out}
            partial.read_last(
                self,
                [rows[i].ids[: ends[i] + 1] for i in batch],
                inputs={name: functools.partial(take, into) for name, into in projections.items()},
                outputs={name: functools.partial(take, into) for name, into in last.items()},
            )
        return found, out

    def head(self, hidden: Tensor) -> Tensor:
        """Logits `[.., vocab]` of final hidden states `[.., hidden]` (norm not included), as the
        model itself makes them: scales and soft-caps are its own.
        """
        with self.evaluating():
            if self.layout.head.kind == "plain":
                return self.hf.get_output_embeddings()(hidden)
            return own_head(self.hf, self.layout.base, hidden)

    def logprobs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities `[.., vocab]`, at least float32, of final hidden states
        `[.., hidden]`.
        """
        return at_least_float32(self.head(hidden)).log_softmax(-1)

    def final_states(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Final hidden states `[B, T, hidden]` (after the last norm) of right-padded `ids`
        `[B, T]`: attention is causal, so the padding needs no mask.
        """
        more = {} if positions is None else {"position_ids": positions}
        with self.evaluating():
            out = self.base(input_ids=ids, use_cache=False, **more)
        return states_of(out)

    # -- what it says; see `models.generation`
    # ---------------------------------------------------------------------------------------------

    def score(
        self,
        prompts: Sequence[str],
        answers: Sequence[str],
        *,
        progress: Callable[[float], None] | None = None,
    ) -> list[Score]:
        """How the model rates `answers[i]` after `prompts[i]`."""
        return generation.score(self, prompts, answers, progress=progress)

    def next_logprobs(self, prompts: Sequence[str]) -> Tensor:
        """Log-probabilities of the next token after each prompt: `[n, vocab]`, float32, on the
        CPU.
        """
        return generation.next_logprobs(self, prompts)

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 16,
        *,
        batch: int = 16,
        as_configured: bool = False,
    ) -> list[str]:
        """Greedy continuations (the new text only), or what the model's `generation_config` asks
        for (`as_configured`).
        """
        return generation.generate(
            self, prompts, max_new_tokens, batch=batch, as_configured=as_configured
        )

    def samples(
        self,
        seed: int = 0,
        start: int = 0,
        *,
        batch: int = 64,
        length: int = 128,
        within: Within | None = None,
    ) -> Iterator[str]:
        """Endless texts sampled from the model itself; document `n` depends on `seed` and `n`
        only. Kept in the cache (`models.samples`). `within`: as of `generation.samples`.
        """
        return samples(self, seed, start, batch=batch, length=length, within=within)

    def virtual(self, factors: Mapping[Any, tuple[Tensor, Tensor]]) -> AbstractContextManager[None]:
        """Run as if weights had low-rank changes, which no weight gets; see `partial.virtual`."""
        return partial.virtual(self, factors)


def _copy(hf: Any) -> Any:
    """A deep copy. What a module has kept of its last run (a recurrence its state) comes without
    the run's graph, which cannot be copied.
    """
    kept = {
        id(value): value.detach().clone()
        for module in hf.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(hf, kept)


def _attend_plainly(hf: Any) -> None:
    """Switch to transformers' plain attention, unless it fails here or gives other logits: it
    repeats heads by a number of the configuration that other attention may never use.
    """
    was, ids = hf.config._attn_implementation, probe_ids(hf, 1)
    wanted = run(hf, ids).logits.float()
    hf.set_attn_implementation("eager")
    try:
        error = float((run(hf, ids).logits.float() - wanted).norm() / wanted.norm())
    except ModelError:
        error = math.inf
    if not error < rounding(hf.dtype):
        hf.set_attn_implementation(was)


def _put(rows: Tensor, into: Tensor, part: Tensor | Routed) -> None:
    """Put the states, or keys, of `part` `[n, width]` into `rows` of `into`."""
    into[rows.to(into.device)] = as_keys(part).to(into)


def lengths(x: Tensor) -> Tensor:
    """`[..]` the lengths of `x` `[.., width]`, at least in float32."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
