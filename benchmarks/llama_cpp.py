"""llama.cpp asked from a process of its own: greedy continuations and their log-probabilities.

The package xllamacpp brings llama.cpp's server into Python, in wheels for Linux, macOS and Windows.
A process of its own, because llama.cpp ends the process where an assertion of its fails, and the
wheels for x86-64 hold instructions (`NEEDS`) that not every processor has.
"""

from __future__ import annotations

import importlib.metadata
import json
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np

PACKAGE = "xllamacpp"
#: What its wheel for Linux on x86-64 is compiled for, as Linux names it. It chooses nothing at run
#: time: `objdump -d` shows these sets outside of any choice, and no AVX-512.
NEEDS = frozenset({"avx", "avx2", "fma", "f16c", "bmi2"})


@dataclass(frozen=True)
class Question:
    """What to go on with.

    Attributes:
        prompt: text, which llama.cpp splits and begins as the file says, or tokens as they are.
        tokens: how many to go on with, at most: the model may end before.
        scales: of the adapters, one each; none: 1 each.
        top: how many of the likeliest tokens to tell the log-probabilities of; 0: of all.
    """

    prompt: str | Sequence[int]
    tokens: int = 1
    scales: Sequence[float] = ()
    top: int = 0


@dataclass(frozen=True)
class Said:
    """The answer.

    Attributes:
        prompt: its tokens.
        text, tokens: the greedy continuation.
        logp: `[tokens, vocabulary]` float64, of each in its place; -inf where `top` left it out.
    """

    prompt: list[int]
    text: str
    tokens: list[int]
    logp: np.ndarray


def version() -> str:
    return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"


def ask(
    model: str | Path,
    questions: Iterable[Question],
    vocabulary: int,
    adapters: Sequence[str | Path] = (),
) -> list[Said]:
    """What llama.cpp says with a GGUF model and GGUF adapters, on one thread of the CPU; keys and
    values are kept in float32.

    Raises:
        RuntimeError: it could not, with what it said last; or the processor lacks `NEEDS`.
    """
    asked = {
        "model": str(model),
        "adapters": [str(path) for path in adapters],
        "vocabulary": vocabulary,
        "questions": [asdict(question) for question in questions],
    }
    command = [sys.executable, __file__]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True)
    if done.returncode == -signal.SIGILL:
        raise RuntimeError(
            f"this processor lacks an instruction that {PACKAGE} was compiled for "
            f"({', '.join(sorted(NEEDS))})"
        )
    if done.returncode:
        raise RuntimeError(f"llama.cpp ended with {done.returncode}: {done.stderr[-2000:]}")
    return [_said(answer, vocabulary) for answer in json.loads(done.stdout.splitlines()[-1])]


def _said(answer: dict[str, Any], vocabulary: int) -> Said:
    if len(answer["logp"]) != len(answer["tokens"]):
        raise RuntimeError("llama.cpp tells nothing of tokens that end within a character")
    logp = np.full((len(answer["tokens"]), vocabulary), -np.inf)
    for row, (ids, values) in zip(logp, answer["logp"], strict=True):
        row[ids] = values
    return Said(answer["prompt"], answer["text"], answer["tokens"], logp)


def _server(model: str, adapters: Sequence[str]) -> Any:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = model
    settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in adapters]
    settings.n_ctx, settings.n_parallel, settings.warmup = 512, 1, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(settings)


def _post(server: Any, path: str, body: dict[str, Any]) -> Any:
    """What the server, which listens on this machine alone, answers."""
    request = Request(f"{server.listening_address}/{path}", json.dumps(body).encode())
    with build_opener(ProxyHandler({})).open(request) as response:
        return json.load(response)


def _answer(server: Any, question: dict[str, Any], adapters: int, vocabulary: int) -> Any:
    prompt = question["prompt"]
    if isinstance(prompt, str):
        prompt = _post(server, "tokenize", {"content": prompt, "add_special": True})["tokens"]
    said = _post(
        server,
        "completion",
        {
            "prompt": prompt,
            "n_predict": question["tokens"],
            "temperature": 0,
            "cache_prompt": False,
            "return_tokens": True,
            "n_probs": question["top"] or vocabulary,
            "lora": [
                {"id": i, "scale": scale}
                for i, scale in enumerate(question["scales"] or [1.0] * adapters)
            ],
        },
    )
    tops = [one["top_logprobs"] for one in said["completion_probabilities"]]
    logp = [[[at["id"] for at in top], [at["logprob"] for at in top]] for top in tops]
    return {"prompt": prompt, "text": said["content"], "tokens": said["tokens"], "logp": logp}


def _main() -> None:
    """Answer what comes in on standard input."""
    asked = json.load(sys.stdin)
    server = _server(asked["model"], asked["adapters"])
    count, vocabulary = len(asked["adapters"]), asked["vocabulary"]
    answers = [_answer(server, one, count, vocabulary) for one in asked["questions"]]
    print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    _main()
