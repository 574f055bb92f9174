"""Tasks of the Language Model Evaluation Harness (`lm-eval`, Gao et al. 2021), where it is
installed: the harness makes the texts and judges the answers, our loaded model gives them.

The model is asked through `EditableModel`, and so is what it is at that moment: edits in force, and
a router, count. A text that is too long for the model loses its beginning, as in the harness.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from knowedit.errors import KnowEditError
from knowedit.evaluation.measures.base import rate
from knowedit.facts.fact import Answer
from knowedit.models.editable import EditableModel
from knowedit.models.tokens import cut, start_tokens

#: New tokens of an answer whose task does not say how many.
NEW_TOKENS = 256


class Request(Protocol):
    """One question of the harness; `args` are what its kind has."""

    args: tuple[Any, ...]


class Replies:
    """The three kinds of requests of the harness' `LM`, answered by a loaded model."""

    def __init__(self, model: EditableModel) -> None:
        super().__init__()
        self.model = model

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """(context, continuation): the log-probability of the whole continuation, nats, and
        whether it is the greedy one.
        """
        pairs = [self._joined(*request.args) for request in requests]
        found = rate(self.model, *zip(*pairs)) if pairs else []
        return [(score.logprob * len(score.choices), score.exact) for score in found]

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """(text,): the log-probability of the whole text, nats, in windows as long as the context,
        each of which begins as a text does.
        """
        return [self._text(request.args[0]) for request in requests]

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """(context, settings): the greedy answer up to the first of `settings["until"]`, of
        `max_gen_toks` tokens at most.

        Raises:
            KnowEditError: the task wants samples.
        """
        found = []
        for request in requests:
            context, settings = request.args
            if settings.get("do_sample"):
                raise KnowEditError(
                    "a task that samples its answers is not measured here, as it is another each "
                    "time; take one with do_sample: false"
                )
            size = min(
                int(settings.get("max_gen_toks", NEW_TOKENS)), max(1, self.model.max_length // 2)
            )
            text = self._end(context, self.model.max_length - size)
            (answer,) = self.model.generate([text], size)
            until = settings.get("until") or []
            stops = [until] if isinstance(until, str) else until
            found.append(min((answer.split(s)[0] for s in stops if s), key=len, default=answer))
        return found

    def _joined(self, context: str, continuation: str) -> tuple[str, Answer]:
        """As `EditableModel.score` takes them. Blanks at either end of their seam are the
        continuation's; an empty context is the token that a text begins or ends with.
        """
        tokenizer = self.model.tokenizer
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        answer = continuation.strip()
        joint = continuation[: len(continuation) - len(continuation.lstrip())]
        size = len(tokenizer(joint + answer)["input_ids"])
        kept = self._end(bare, self.model.max_length - size)
        return kept or tokenizer.bos_token or tokenizer.eos_token, Answer(answer, joint)

    def _end(self, text: str, tokens: int) -> str:
        """The end of a text: as many of its tokens as there is room for."""
        encoded = self.model.tokenizer(text, return_offsets_mapping=True, verbose=False)
        offsets = encoded["offset_mapping"]
        return text[offsets[-tokens][0] :] if len(offsets) > tokens > 0 else text

    @torch.no_grad()
    def _text(self, text: str) -> float:
        model, tokenizer = self.model, self.model.tokenizer
        begin = start_tokens(tokenizer) or [tokenizer.eos_token_id]
        ids = tokenizer(text, truncation=False, verbose=False)["input_ids"]
        total = 0.0
        for window in cut(ids, model.max_length, begin):
            inputs, _ = model.pad([window])
            logp = model.logprobs(model.final_states(inputs)[0, len(begin) - 1 : -1])
            wanted = inputs[0, len(begin) :, None].to(logp.device)
            total += float(logp.gather(1, wanted).double().sum())
        return total


class Harness:
    """Some tasks of lm-eval.

    Args:
        names: of tasks or groups, or paths of YAML files with a task each.
        limit: at most so many items of a task; None: all.

    Raises:
        KnowEditError: lm-eval is not installed, or knows no such task.
    """

    def __init__(self, names: Sequence[str], limit: int | None = None) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise KnowEditError(
                f"the task {names[0]!r} is one of lm-eval, which is not installed; pip install "
                "'knowedit-kernels[ability]', or take the bundled tasks (all)"
            )
        from lm_eval.tasks import TaskManager  # takes seconds: only for who asks

        self.names, self.limit = list(names), limit
        listed = [name for name in names if not _is_file(name)]
        self.manager = TaskManager(include_defaults=bool(listed))
        if unknown := [name for name in listed if not self.manager.match_tasks([name])]:
            raise KnowEditError(
                f"lm-eval has no task {unknown[0]!r}; `lm-eval ls tasks` lists them, and the path "
                "of a task's YAML file is taken too"
            )

    def marks(
        self, model: EditableModel
    ) -> dict[str, tuple[dict[str, NDArray[np.float64]], float | None]]:
        """The figures of every item, `{measure: [items]}`, of each task that was named, or that is
        in a group that was, and the accuracy by chance where one chooses.

        Raises:
            KnowEditError: lm-eval cannot run a task, or it has no figure that is a mean over items.
        """
        from lm_eval import simple_evaluate
        from lm_eval.api.model import LM

        adapter = type("KnowEdit", (Replies, LM), {})
        try:
            found = simple_evaluate(
                adapter(model),
                tasks=self.names,
                task_manager=self.manager,
                limit=self.limit,
                bootstrap_iters=0,
                log_samples=True,
            )
        except KnowEditError:
            raise
        except Exception as error:
            raise KnowEditError(
                f"lm-eval could not run {', '.join(self.names)} ({type(error).__name__}: "
                f"{str(error)[:300]}); its data must be on this machine or within its reach"
            ) from error
        return {task: _marks(task, found) for task in found["samples"]}


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def _marks(task: str, found: dict[str, Any]) -> tuple[dict[str, NDArray[np.float64]], float | None]:
    """Of one task: its figures that are means over items, by their name (with the filter's, where
    there are several), and the accuracy by chance.
    """
    results, figures = found["results"][task], {}
    samples = found["samples"][task]
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    for chosen in filters:
        mine = [sample for sample in samples if sample["filter"] == chosen]
        for metric in mine[0]["metrics"]:
            name = metric if len(filters) == 1 else f"{metric}, {chosen}"
            values = _numbers(sample[metric] for sample in mine)
            said = results.get(f"{metric},{chosen}")
            if values is not None and said is not None and np.isclose(values.mean(), said):
                figures[name] = values
    if not figures:
        raise KnowEditError(
            f"the task {task!r} of lm-eval has no figure that is a mean over its items, so that "
            "there is no interval for it; choose another"
        )
    choices = [len(sample["arguments"]) for sample in samples]
    choose = found["configs"][task].get("output_type") == "multiple_choice"
    asked_twice = "acc_mutual_info" in samples[0]["metrics"]  # also without the context
    by_chance = float(np.mean([1 / n for n in choices])) * (2 if asked_twice else 1)
    return figures, by_chance if choose else None


def _numbers(values: Iterable[Any]) -> NDArray[np.float64] | None:
    """The values as an array; None where they are no numbers."""
    values = list(values)
    known = all(isinstance(value, (bool, int, float, np.number)) for value in values)
    return np.array(values, dtype=float) if known else None
