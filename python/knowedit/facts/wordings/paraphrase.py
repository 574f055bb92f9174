"""Paraphrases of a prompt from any OpenAI-compatible endpoint, checked and cached.

The official client does the talking: it retries what is worth it (429, 5xx, time-outs, broken
connections) with growing pauses and honours ``Retry-After``. Nothing is kept unless it is complete;
what was kept is never asked for again, so a study can be repeated without the endpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from knowedit.errors import KnowEditError
from knowedit.io.files import atomic_file, cache_dir

logger = logging.getLogger(__name__)

LENGTHS = 3, 300  # characters of a paraphrase
ROUNDS = 6  # answers that are asked for before giving up on getting enough
EXAMPLES = 3  # of refused paraphrases, in the error
_TASK = (
    "Rewrite the unfinished text in {count} different ways, each ending where the answer would "
    "begin, without the answer. "
    "Reply with a JSON list of strings only.\n\nText: {prompt}"
)
#: One example keeps small models to the form.
_EXAMPLE = (
    "The capital of France is",
    [
        "France has a capital, and its name is",
        "The city that is its capital is called",
        "Q: What is the capital of France? A:",
    ],
)


class ParaphraseError(KnowEditError):
    """Paraphrases that could not be had; the message says from where, why, and what to do."""


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server.

    Attributes:
        url: its base, mostly ending in "/v1".
        model: the name it knows the model by.
        key_variable: the environment variable with the key; local servers need none.
        timeout: seconds a request; retries: of a failed one.
        tokens: longest answer, what a reasoning model thinks included.
        temperature: of the sampling; 0 always gives the same answer, which must then have enough
            paraphrases.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    retries: int = 4
    tokens: int = 4096
    temperature: float = 1.0

    @property
    def shown(self) -> str:
        """The address without the name, password and query that it may hold: what is said, and
        kept.
        """
        parts = urlsplit(self.url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))

    def ask(self, turns: Sequence[str], seed: int) -> str:
        """The model's answer to a conversation, the user's turn first.

        Raises:
            ParaphraseError: no answer after all retries, a refusal, or one that is no chat
                completion.
        """
        import openai  # takes a second: only for who asks

        key = os.environ.get(self.key_variable) or "none"
        try:
            with openai.OpenAI(
                base_url=self.url, api_key=key, timeout=self.timeout, max_retries=self.retries
            ) as client:
                said: Any = [
                    {"role": ("user", "assistant")[n % 2], "content": text}
                    for n, text in enumerate(turns)
                ]
                reply = client.chat.completions.create(
                    model=self.model,
                    messages=said,
                    temperature=self.temperature,
                    seed=seed,
                    max_completion_tokens=self.tokens,
                )
            text = reply.choices[0].message.content
            if not isinstance(text, str):
                raise TypeError(f"the answer's content is {type(text).__name__}")
            return text
        except openai.APIStatusError as error:
            reason = f"it answered {error.status_code}: {error.message[:200]}"
            if error.status_code in (401, 403):
                reason += f"; put a valid key into {self.key_variable}"
        except openai.APITimeoutError:
            reason = f"no answer within {self.timeout:g} s, {self.retries + 1} times"
        except openai.APIConnectionError as error:
            reason = (
                f"it cannot be reached ({error.__cause__ or error}); start it, or correct the "
                "address"
            )
        except (openai.OpenAIError, ValueError, TypeError, AttributeError, IndexError) as error:
            reason = (
                f"its answer is no chat completion ({type(error).__name__}: {str(error)[:200]})"
            )
        raise ParaphraseError(
            f"endpoint {self.shown}, model {self.model!r}: "
            f"{reason.replace(self.url, self.shown)}; or use the shipped ones"
        )


def paraphrases(
    prompt: str,
    count: int,
    endpoint: Endpoint,
    forbidden: Sequence[str] = (),
    refuse: Callable[[str], str | None] = lambda text: None,
) -> list[str]:
    """`count` different paraphrases of `prompt`, from the cache or else from the endpoint.

    Args:
        forbidden: answers that none may give away, as whole words.
        refuse: why a text cannot be used, or None.

    Returns:
        Full prompts on one line each, in the order they came.

    Raises:
        ParaphraseError: the endpoint failed, or did not give enough usable ones. Nothing is kept
            then.
        KnowEditError: `count` is not positive.
    """
    if count < 1:
        raise KnowEditError(f"paraphrases: ask for at least 1, not {count}")
    path = _cached(prompt, count, endpoint, forbidden)
    if len(kept := _read(path)) == count and not any(map(refuse, kept)):
        logger.info("%d paraphrases of %r from the cache (%s)", count, prompt, path)
        return kept
    shown, written = _TASK.format(count=len(_EXAMPLE[1]), prompt=_EXAMPLE[0]), _EXAMPLE[1]
    found: list[str] = []
    refused: list[str] = []
    for attempt in range(ROUNDS):
        answer = endpoint.ask(
            [shown, json.dumps(written), _TASK.format(count=max(count, 2), prompt=prompt)], attempt
        )
        for text in parse(answer):
            reason = _unfit(text, prompt, found, forbidden) or refuse(text)
            if reason is None:
                found.append(text)
            else:
                refused.append(f"{text[:60]!r} ({reason})")
        if len(found) >= count:
            with atomic_file(path) as temporary:
                record = {
                    "endpoint": endpoint.shown,
                    "model": endpoint.model,
                    "prompt": prompt,
                    "of": path.stem,
                    "paraphrases": found[:count],
                }
                temporary.write_text(
                    json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
                )
            return found[:count]
    shown_refusals = ", ".join(refused[:EXAMPLES]) or "nothing, the answers held no list"
    raise ParaphraseError(
        f"endpoint {endpoint.shown}, model {endpoint.model!r}: only {len(found)} of {count} usable "
        f"paraphrases of {prompt!r} in {ROUNDS} answers; refused: {shown_refusals}; ask for "
        "fewer, or name a stronger model"
    )


def parse(answer: str) -> list[str]:
    """The texts of a JSON list anywhere in an answer, else of its numbered or bulleted lines."""
    for found in re.finditer(r"\[", answer):
        try:
            listed, _ = json.JSONDecoder().raw_decode(answer[found.start() :])
        except (ValueError, RecursionError):
            continue
        return [" ".join(text.split()) for text in listed if isinstance(text, str)]
    lines = re.findall(r"^\s*(?:\d+[.):]|[-*•])\s+(.+?)\s*$", answer, re.MULTILINE)
    return [" ".join(line.strip("\"'`").split()) for line in lines]


def _unfit(text: str, prompt: str, found: Sequence[str], forbidden: Sequence[str]) -> str | None:
    """Why a paraphrase cannot be used."""
    shortest, longest = LENGTHS
    if not shortest <= len(text) <= longest:
        return f"{len(text)} characters, not {shortest} to {longest}"
    if _plain(text) in map(_plain, (prompt, *found)):
        return "said before"
    given = next(
        (a for a in forbidden if re.search(rf"(?<!\w){re.escape(a)}(?!\w)", text, re.IGNORECASE)),
        None,
    )
    return f"gives away {given!r}" if given else None


def _plain(text: str) -> str:
    return (
        re.sub(r"[\W_]+", " ", text.casefold()).strip()
        + " "
        + "".join(re.findall(r"[+*/=-]", text))
    )


def _cached(prompt: str, count: int, endpoint: Endpoint, forbidden: Sequence[str]) -> Path:
    name = json.dumps(
        [endpoint.shown, endpoint.model, endpoint.temperature, prompt, count, sorted(forbidden)]
    )
    return (
        cache_dir("paraphrases")
        / f"{hashlib.blake2b(name.encode(), digest_size=12).hexdigest()}.json"
    )


def _read(path: Path) -> list[str]:
    """A cached list; empty for none, and for one that is damaged, which is then asked for again."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        kept = record["paraphrases"]
        if record["of"] != path.stem:
            raise ValueError("it is of another question")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        logger.warning("%s is damaged (%s); asking again", path, error)
        return []
    return [text for text in kept if isinstance(text, str)] if isinstance(kept, list) else []
