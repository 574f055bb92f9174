"""EditableModel: a causal LM with the four things editing needs - tokens with a subject in them,
the MLP keys and layer outputs at chosen tokens, log-probabilities of answers, and edits that can be
taken back bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from knowedit.errors import EditError, ModelError
from knowedit.models.fingerprint import weights_fingerprint
from knowedit.models.generation import Score, next_logprobs, score
from knowedit.models.structure import Layout, detect
from knowedit.models.tokens import Row, batches, tokenise
from knowedit_kernels import WeightLedger
from knowedit_kernels.lowrank import Change

if TYPE_CHECKING:
    from knowedit.methods.learned.serac.memory import Memory


class _Stop(Exception):
    """Raised inside a forward pass once the deepest needed value was read."""


class EditableModel:
    """A transformers causal LM and its tokenizer, ready to be edited.

    Attributes:
        hf: the transformers model, in evaluation mode, its parameters frozen.
        tokenizer: its fast tokenizer.
        layout: where the edited projections are (`architectures.Layout`).
        name: as given to `load_model`.
        memory: of the memory edits (SERAC) in force.

    Raises:
        ModelError: the model cannot be edited, with the reason.
    """

    def __init__(self, hf: Any, tokenizer: Any, *, name: str | None = None) -> None:
        self.layout: Layout = detect(hf)
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"{type(tokenizer).__name__} is a slow tokenizer without character offsets; use "
                f"a fast one"
            )
        self.hf, self.tokenizer = hf.eval().requires_grad_(False), tokenizer
        self.name = name or getattr(hf.config, "_name_or_path", "") or type(hf).__name__
        if away := [name for name, parameter in hf.named_parameters() if parameter.is_meta]:
            raise ModelError(
                f"{len(away)} parameters of {self.name} are not in memory ({away[0]}, ...): "
                f"device_map put them on the disk or "
                "the CPU; use more or larger GPUs, dtype='bfloat16', or device_map='cpu'"
            )
        if self.dtype == torch.float16 and self.device.type == "cpu":
            raise ModelError(
                "float16 matrix products are ~100x slower than float32 on a CPU; load with "
                "dtype='float32'"
            )
        names = {self.layout.weight_name(i): self.weight(i) for i in range(len(self.layers))}
        self.ledger = WeightLedger(names, transposed=names if self.layout.transposed else ())
        self._fingerprint: str | None = None
        self.memory: Memory | None = None
        self.rewritten: dict[
            str, set[tuple[str, int]]
        ] = {}  # neurons, by the key of the edit in force

    # -- what it is
    # ---------------------------------------------------------------------------------------------

    @property
    def layers(self) -> nn.ModuleList:
        return self.hf.get_submodule(self.layout.layers)

    @property
    def norm(self) -> nn.Module:
        return self.hf.get_submodule(self.layout.norm)

    @property
    def d_ff(self) -> int:
        return self.layout.d_ff

    @property
    def hidden(self) -> int:
        return self.layout.hidden

    @property
    def dtype(self) -> torch.dtype:
        return self.weight(0).dtype

    @property
    def device(self) -> torch.device:
        return self.hf.get_input_embeddings().weight.device

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
        value.
        """
        self.check_layers([layer])
        return self.hf.get_submodule(self.layout.projection.format(layer))

    def weight(self, layer: int) -> Tensor:
        """The projection's weight as the model stores it (`[hidden, d_ff]`, or transposed for
        GPT-2).
        """
        return self.projection(layer).weight  # type: ignore[return-value]

    def register(self, changes: Mapping[str, Change]) -> Mapping[str, Change]:
        """Make the ledger know the parameters of `changes`, which it gives back; those edited by
        layer it knows.
        """
        new = set(changes) - {name for name in changes if name in self.ledger}
        for name, parameter in self.hf.named_parameters() if new else ():
            if name in new:
                owner = self.hf.get_submodule(name.rpartition(".")[0])
                self.ledger.register(
                    name,
                    parameter,
                    transposed=type(owner).__name__ == "Conv1D" and parameter.ndim == 2,
                )
        return changes

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raise ModelError for a layer that does not exist."""
        for layer in layers:
            if not 0 <= layer < len(self.layers):
                raise ModelError(
                    f"layer {layer} does not exist: {self.name} has layers "
                    f"0..{len(self.layers) - 1}"
                )

    @property
    def fingerprint(self) -> str:
        """Digest of all *unedited* weights (name, shape, dtype, values), taken on first use; 32 hex
        digits.

        Raises:
            EditError: asked for the first time while an edit is applied.
        """
        if self._fingerprint is None:
            if self.ledger.active:
                raise EditError(
                    "the model's fingerprint was never taken before an edit was applied; undo "
                    "the edit first"
                )
            self._fingerprint = weights_fingerprint(self.hf)
        return self._fingerprint

    def draft(self) -> EditableModel:
        """A bfloat16 copy to optimise targets on: a third of the time on CPUs with bfloat16 units.

        Attention is the plain one on a CPU: torch's fused backward is slow there on short rows.
        Elsewhere a bfloat16 model is its own draft.
        """
        if self.dtype == torch.bfloat16 and self.device.type != "cpu":
            return self
        copied = copy.deepcopy(self.hf).to(torch.bfloat16)
        if self.device.type == "cpu":
            copied.set_attn_implementation("eager")
        return EditableModel(copied, self.tokenizer, name=self.name)

    # -- text to tokens
    # -----------------------------------------------------------------------------------------

    def row(self, prompt: str, subject: str | None = None, answer: str | None = None) -> Row:
        """Tokenise `prompt` (+ `answer`) and find the last token of `subject`; see
        `tokens.tokenise`.
        """
        return tokenise(self.tokenizer, prompt, subject, answer, longest=self.max_length)

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
        """Right-pad token lists to `ids [B, T]` and `mask [B, T]` (bool) on the model's device."""
        width = max(map(len, rows))
        fill = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([list(r) + [fill] * (width - len(r)) for r in rows], device=self.device)
        lengths = torch.tensor([len(r) for r in rows], device=self.device)
        return ids, torch.arange(width, device=self.device) < lengths[:, None]

    # -- running it
    # ---------------------------------------------------------------------------------------------

    def forward_to(
        self,
        layer: int,
        ids: Tensor,
        on_key: Callable[[int, Tensor], None],
        layers: Sequence[int] = (),
        on_output: Callable[[int, Tensor], None] | None = None,
        positions: Tensor | None = None,
    ) -> None:
        """One partial forward pass, stopped before `layer`'s projection (or after `layer` when
        outputs are asked for).

        Args:
            layer: the deepest layer needed; nothing above its MLP's input runs.
            ids: `[B, T]`, right-padded: causal attention never looks at the padding, so no mask is
                needed.
            on_key: called with (layer, keys `[B, T, d_ff]`) for each of `layers` (default:
                `layer`).
            on_output: called with (layer, layer output `[B, T, hidden]`) for `layer`; the pass then
                ends after it.
            positions: `[B, T]`, where several texts stand behind each other in a row: each begins
                again at 0.
        """
        wanted = set(layers or [layer])
        handles = []

        def key_hook(index: int):
            def hook(_module, inputs):
                if index in wanted:
                    on_key(index, inputs[0])
                if index == layer and on_output is None:
                    raise _Stop

            return hook

        def output_hook(_module, _inputs, output):
            on_output(layer, output[0] if isinstance(output, tuple) else output)  # type: ignore[misc]
            raise _Stop

        for index in sorted(wanted | {layer}):
            handles.append(self.projection(index).register_forward_pre_hook(key_hook(index)))
        if on_output is not None:
            handles.append(self.layers[layer].register_forward_hook(output_hook))
        try:
            with torch.no_grad():
                more = {} if positions is None else {"position_ids": positions}
                self.hf.base_model(input_ids=ids, use_cache=False, **more)
        except _Stop:
            return
        finally:
            for handle in handles:
                handle.remove()
        raise ModelError(
            f"{self.name}: the forward pass ended without reaching layer {layer}'s projection"
        )

    def keys(
        self,
        rows: Sequence[Row],
        layers: Sequence[int],
        *,
        outputs: bool = False,
        budget: int = 4096,
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        """MLP keys at each row's subject token, for all `layers` in one pass; nothing after that
        token is run.

        Args:
            outputs: also return the deepest layer's output at the token.
            budget: padded tokens a batch.

        Returns:
            `{layer: keys [n, d_ff]}` and the outputs `[n, hidden]` or None, float32.
        """
        self.check_layers(layers)
        deepest, count = max(layers), len(rows)
        found = {layer: torch.empty(count, self.d_ff, device=self.device) for layer in layers}
        out = torch.empty(count, self.hidden, device=self.device) if outputs else None
        ends = [len(r.ids) - 1 if r.subject is None else r.subject for r in rows]
        for batch in batches([e + 1 for e in ends], budget):
            ids, _ = self.pad([rows[i].ids[: ends[i] + 1] for i in batch])
            index, at = (
                torch.tensor(batch, device=self.device),
                torch.tensor([ends[i] for i in batch], device=self.device),
            )
            span = torch.arange(len(batch), device=self.device)

            def on_key(layer: int, key: Tensor, index=index, at=at, span=span) -> None:
                found[layer][index.to(key.device)] = key[span.to(key.device), at.to(key.device)].to(
                    found[layer]
                )

            def on_output(_layer: int, h: Tensor, index=index, at=at, span=span) -> None:
                assert out is not None
                out[index] = h[span.to(h.device), at.to(h.device)].to(out)

            self.forward_to(deepest, ids, on_key, layers, on_output if outputs else None)
        return found, out

    def head(self, hidden: Tensor) -> Tensor:
        """Logits `[.., vocab]` of final hidden states `[.., hidden]` (norm not included), soft-cap
        as in the model.
        """
        logits = self.hf.get_output_embeddings()(hidden)
        cap = getattr(self.hf.config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    def score(
        self,
        prompts: Sequence[str],
        answers: Sequence[str],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[Score]:
        """How the model rates `answers[i]` after `prompts[i]`; see `scoring.score`."""
        found = score(self, prompts, answers, progress=progress)
        return self._remembered(
            prompts, found, lambda which, asked: score(self, asked, [answers[i] for i in which])
        )

    def next_logprobs(self, prompts: Sequence[str]) -> Tensor:
        """Log-probabilities of the next token after each prompt: `[n, vocab]`, float32, on the
        CPU.
        """
        if not prompts:
            return torch.empty(0, self.hf.get_output_embeddings().weight.shape[0])
        found = list(next_logprobs(self, prompts))
        return torch.stack(
            self._remembered(prompts, found, lambda _, asked: list(next_logprobs(self, asked)))
        )

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[str], max_new_tokens: int = 16, *, batch: int = 16
    ) -> list[str]:
        """Greedy continuations (the new text only)."""
        found = self._generate(prompts, max_new_tokens, batch)
        return self._remembered(
            prompts, found, lambda _, asked: self._generate(asked, max_new_tokens, batch)
        )

    def _generate(self, prompts: Sequence[str], max_new_tokens: int, batch: int) -> list[str]:
        found = self.continuations(prompts, max_new_tokens, batch)
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in found]

    @torch.no_grad()
    def greedy(
        self, prompts: Sequence[str], max_new_tokens: int, batch: int, *, logits: bool = False
    ) -> Iterator[tuple[Tensor, int, Tensor | None]]:
        """Of each batch, left-padded: the new tokens `[B, T]`, the token that fills up finished
        rows, and if asked for the logits `[B, T, vocab]`. Equal prompts and batches give equal
        bits, with and without the logits."""
        fill = (
            self.tokenizer.pad_token_id
            if self.tokenizer.pad_token_id is not None
            else self.tokenizer.eos_token_id
        )
        for start in range(0, len(prompts), batch):
            rows = [self.row(p).ids for p in prompts[start : start + batch]]
            width = max(map(len, rows))
            ids = torch.tensor([[fill] * (width - len(r)) + r for r in rows], device=self.device)
            mask = torch.tensor(
                [[0] * (width - len(r)) + [1] * len(r) for r in rows], device=self.device
            )
            out = self.hf.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=fill,
                output_logits=logits,
                return_dict_in_generate=True,
            )
            yield out.sequences[:, width:], fill, torch.stack(out.logits, 1) if logits else None

    @torch.no_grad()
    def continuations(
        self, prompts: Sequence[str], max_new_tokens: int = 16, batch: int = 16
    ) -> list[list[int]]:
        """Greedy continuations as tokens, without the padding behind the end of a text; memory
        edits have no part in them.
        """
        found: list[list[int]] = []
        for new, fill, _ in self.greedy(prompts, max_new_tokens, batch):
            sizes = (new != fill).int().cumsum(1).argmax(1) + (new != fill).any(
                1
            )  # up to the last token that is no filling
            found += [row[:size] for row, size in zip(new.tolist(), sizes.tolist())]
        return found

    def _remembered(
        self, prompts: Sequence[str], found: list, ask: Callable[[list[int], list[str]], list]
    ) -> list:
        """`found`, with the counterfactual model's results where a prompt is in the scope of a
        memory edit.

        The base has answered every prompt, those too: its batches, and so its bits, are the same as
        without a memory.
        """
        inside = (
            {i: text for i, text in enumerate(self.memory.route(prompts)) if text}
            if self.memory
            else {}
        )
        if self.memory and inside:
            with self.memory.counterfactual():
                for i, value in zip(inside, ask(list(inside), list(inside.values()))):
                    found[i] = value
        return found

    def samples(
        self, seed: int = 0, start: int = 0, *, batch: int = 64, length: int = 128
    ) -> Iterator[str]:
        """Endless texts sampled from the model itself (temperature 1, no truncation of the
        distribution).

        Document `n` depends on `seed` and `n` only, so a run can go on at `start`.
        """
        first = (
            self.tokenizer.bos_token_id
            if self.tokenizer.bos_token_id is not None
            else self.tokenizer.eos_token_id
        )
        fill = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else first
        ids = torch.full((batch, 1), first, device=self.device)
        for number in range(start // batch, 1 << 31):
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(
                    (seed * 1_000_003 + number) % (1 << 32)
                )  # the CPU generator uses 32 bits
                out = self.hf.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=length - 1,
                    pad_token_id=fill,
                )
            texts = self.tokenizer.batch_decode(out, skip_special_tokens=True)
            yield from texts[start % batch :] if number == start // batch else texts

    @contextmanager
    def virtual(self, factors: Mapping[Any, tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Run as if layer `l`'s weight had `U Vᵀ` added (`{l: (U [hidden, r], V [d_ff, r])}`); no
        weight is touched.

        Instead of a layer's number, the name of any linear module below `hf`; each row of the batch
        can have its own pair, `[B, out, r]` and `[B, in, r]`.
        """

        def hook(pair):
            def add(_module, inputs, output):
                left, right = (f.to(output) for f in pair)
                return output + (inputs[0] @ right) @ left.mT

            return add

        modules = [
            self.hf.get_submodule(at) if isinstance(at, str) else self.projection(at)
            for at in factors
        ]
        handles = [
            module.register_forward_hook(hook(pair))
            for module, pair in zip(modules, factors.values())
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
