"""Texts as tokens, with the places that editing needs: the subject's last token and the answer's
first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from knowedit.errors import EditError, ModelError
from knowedit.facts.fact import Answer, last_place


@dataclass(frozen=True)
class Row:
    """One tokenised text: `ids`, the index of the subject's last token, where the answer's tokens
    begin, and the index of the subject's first token."""

    ids: list[int]
    subject: int | None = None
    answer: int | None = None
    start: int | None = None


def tokenise(
    tokenizer: Any,
    prompt: str,
    subject: str | None = None,
    answer: str | None = None,
    *,
    longest: int = 1 << 30,
    vocabulary: int = 1 << 60,
    sayable: int = 1 << 60,
) -> Row:
    """Tokenise `prompt` (+ `answer`), and find the last token of `subject` in it: where `{}` stands
    for it in the prompt, or else its last occurrence.

    Prompt and answer are joined as they would be written, most often with a blank (`join`), and the
    answer begins a token of its own: whoever asks the prompt alone gets its tokens, also where the
    tokenizer has one for both sides of the joint ("(shape").
    What the tokenizer's template puts in front of a text stays (a start token); what it puts behind
    one does not: the text goes on.

    Raises:
        EditError: the text has no tokens, the subject is not in the prompt, ends inside a token,
            the text is longer than the context (`longest` tokens), or the model has no embedding
            for one of its tokens (`vocabulary` of them), or no logit for one of the answer's
            (`sayable` of them).
    """
    template = subject is not None and prompt.count("{}") == 1
    given = prompt.index("{}") if template else None
    prompt = prompt.replace("{}", subject) if template and subject is not None else prompt
    text = prompt if answer is None else join(prompt, answer)
    ids, offsets = _tokens(tokenizer, text)
    # white space, too, may be other tokens in front of a word than at a text's end
    if answer is not None and (
        prompt[-1:].isspace() or any(begin < len(prompt) < end for begin, end in offsets)
    ):
        ids, offsets = _apart(tokenizer, prompt, text) or (ids, offsets)
    if not ids:
        raise EditError(
            f"the text {text!r} has no tokens: this tokenizer puts none in front of a text; give "
            "a prompt with at least one"
        )
    if len(ids) > longest:
        raise EditError(
            f"{text[:60]!r}...: {len(ids)} tokens are more than the model's context of {longest}"
        )
    check_embedded(tokenizer, ids, vocabulary)
    where = start = None
    if subject is not None:
        at = last_place(subject, prompt) if given is None else given
        if at < 0:
            raise EditError(f"subject {subject!r} does not occur in {prompt!r}")
        end = at + len(subject.rstrip())
        where = next(
            (i for i in reversed(range(len(ids))) if offsets[i][0] < end <= offsets[i][1]), None
        )
        if where is None:
            raise EditError(f"the tokenizer gives subject {subject!r} no token in {prompt!r}")
        start = next(i for i in range(len(ids)) if offsets[i][1] > at)
        rest = text[end : offsets[where][1]]
        if rest.strip():
            raise EditError(
                f"subject {subject!r} ends inside the token {text[slice(*offsets[where])]!r} of "
                f"{prompt!r}; "
                f"make {subject + rest!r} the subject or put a space after it"
            )
    first = None
    if answer is not None:
        first = next((i for i in range(len(ids)) if offsets[i][1] > len(prompt)), len(ids))
        if first == len(ids) or not answer.strip():
            raise EditError(f"the answer {answer!r} to {prompt!r} has no tokens")
        if first == 0:
            raise EditError(f"the answer {answer!r} has no prompt before it")
        if unknown := [token for token in ids[first:] if token >= sayable]:
            raise EditError(
                f"the answer {answer!r}: the model has no logit for its token "
                f"{tokenizer.convert_ids_to_tokens(unknown[0])!r}, which it can read and not say"
            )
    return Row(ids, where, first, start)


def _tokens(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """The tokens of `text`, without what the template puts behind it, and what each covers."""
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    kept = len(ids) - len(_template(encoded)[1])
    return ids[:kept], list(encoded["offset_mapping"][:kept])


def _apart(
    tokenizer: Any, prompt: str, text: str
) -> tuple[list[int], list[tuple[int, int]]] | None:
    """As `_tokens` gives it: the prompt's tokens and then those of what follows it in `text`. These
    are taken from behind another character, as some tokenizers begin a text with a blank. None
    where no such character is a token of its own.
    """
    ids, offsets = _tokens(tokenizer, prompt)
    for ahead in ("\n", "a") if ids else ():
        behind, places = _tokens(tokenizer, ahead + text[len(prompt) :])
        first = next((i for i, (_, end) in enumerate(places) if end > 1), len(places))
        if first < len(places) and places[first][0] == 1:
            moved = [(len(prompt) - 1 + a, len(prompt) - 1 + b) for a, b in places[first:]]
            return ids + behind[first:], offsets + moved
    return None


def check_tokenizer(tokenizer: Any) -> None:
    """Raise ModelError for a tokenizer that cannot say which characters a token covers."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} is a slow tokenizer without character offsets; use a fast "
            "one (AutoTokenizer.from_pretrained gives one where there is a tokenizer.json)"
        )


def check_vocabulary(tokenizer: Any, rows: int) -> None:
    """Raise ModelError for a tokenizer whose ordinary tokens go beyond the `rows` of a model's
    embedding, or of its head. Tokens that were added to it may: they are refused where a text holds
    one.
    """
    added = tokenizer.added_tokens_decoder
    missing = [i for i in range(rows, len(tokenizer)) if i not in added]
    if missing:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {rows} "
            f"({tokenizer.convert_ids_to_tokens(missing[0])!r} is left out): this tokenizer "
            "belongs to another model; pass the model's own as tokenizer="
        )


def check_embedded(tokenizer: Any, ids: Sequence[int], vocabulary: int) -> None:
    """Raise EditError for tokens beyond the `vocabulary` that a model embeds."""
    if unknown := [token for token in ids if token >= vocabulary]:
        raise EditError(
            f"{tokenizer.decode(list(ids)[:40])[:60]!r}: the model has no embedding for its token "
            f"{tokenizer.convert_ids_to_tokens(unknown[0])!r}; leave it out, or give the model one "
            "(resize_token_embeddings)"
        )


def start_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer's template puts in front of every text: its start token, most often, or
    nothing.
    """
    return _template(tokenizer("a"))[0]


def cut(ids: Sequence[int], length: int, start: Sequence[int] = ()) -> list[list[int]]:
    """A tokenised document in pieces of at most `length` tokens, each of which begins with `start`
    (`start_tokens`) as the document does: some models are broken without their start token.

    Raises:
        ModelError: `length` leaves no room behind the start tokens.
    """
    start = list(start)
    begun = list(ids[: len(start)]) == start
    body = list(ids[len(start) :] if begun else ids)
    room = length - len(start)
    if room < 1:
        raise ModelError(
            f"pieces of {length} tokens have no room for text behind the {len(start)} tokens that "
            "every text starts with; give a larger length"
        )
    return [start + body[i : i + room] for i in range(0, len(body), room)]


def _template(encoded: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer's template put in front of a text and behind it; those
    in the text itself are not among them.
    """
    ids, of_text = list(encoded["input_ids"]), [i is not None for i in encoded.sequence_ids(0)]
    if True not in of_text:
        return ids, []
    first, behind = of_text.index(True), of_text[::-1].index(True)
    return ids[:first], ids[len(ids) - behind :]


#: Thai, Lao, Tibetan, Burmese, Khmer, Chinese and Japanese: written without blanks.
_NO_BLANKS = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3000-\u312f\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff"
    "\uff00-\uffef\U00020000-\U0003ffff]"
)
#: Punctuation of Chinese and Japanese, which brings its own blank along.
_WIDE = re.compile("[\u3000-\u303f\uff00-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]")

#: Behind these the next word follows without a blank.
_OPENS = re.compile(
    # brackets, opening quotes, signs before names and numbers
    r"[(\[{\u00ab\u201c\u2018\u201e\u201a\u2039\u00bf\u00a1@_\\$\u20ac\u00a3\u00a5\u20b9\u20a9\u20bd]\Z"
    # a path, a type's parameter, an arrow or a sum that is tied to the word before; an end tag
    r"|[^\s\-+*/%<>=!&|^~][\-+*/%<>=!&|^~]*[/<>=]\Z|</\Z|^#include\s*<\Z|\S(::|\^)\Z"
    r"|\w[-\u2010\u2011\u2013\u2014]\Z",  # a compound, a span of years
    re.MULTILINE,
)
#: An elided article ("l'Italie", "dell'arte"), which the possessive of a plural is not; the end of
#: a quotation may look like one.
_ELIDED = re.compile(
    r"\A(?!.*(?<!\w)['\u2018]\w).*(?<!\w)([^\W\d_]{1,2}|\w*qu|\w*ll|sant|un)['\u2019]\Z",
    re.IGNORECASE | re.DOTALL,
)
#: What stands without a blank behind the last word: closing signs ("," but not ".NET"), the
#: endings of English words ("'s"), a degree.
_CLOSES = re.compile(
    r"[)\]},;\u00b0]|[.:!?%\u00bb\u201d\u2026\u203a]+([\s\"')\]]|$)"
    r"|['\u2019](s|t|re|ve|ll|d|m)\b|n't\b"
)
#: A name whose dot is followed by a part of it: in code ("x = np.", "f(np.", "np.linalg.", what is
#: written below an import) and in an address.
_DOTTED = re.compile(
    r"(=\s*[^\W\d]\S*|=.*[-+*/,]\s*\w+|[(\[][^)\]\n]*\w|[^\W\d]\w+\.[^\W\d]\w+|\bself|\bwww|://\S*\w"
    r"|^(import|from)\s(.*\n)+(.*[\s(\[=,])?[^\W\d]\w*)\.\Z",
    re.MULTILINE,
)
#: A number that goes on: its decimals, its thousands, the minutes of an hour.
_NUMBER = ((r"\d\.$", r"\d"), (r"\b\d{1,3}(,\d{3})*,$", r"\d{3}\b"), (r"\b\d{1,2}:$", r"[0-5]\d\b"))


def join(prompt: str, answer: str) -> str:
    """Prompt and answer as they would be written: with one blank between them, unless the prompt
    ends in white space, in something that opens ("(", "https://", a quote not yet closed), in a
    tight sign between words ("2+2=", "1999-", the dot of "np." in code), or the answer begins with
    something that closes ("," or "'s") or goes on with a number, or both are in a script that is
    written without blanks. An `Answer` may say what joins it.
    """
    joint = answer.joint if isinstance(answer, Answer) else None
    answer = answer.strip()
    if joint is not None:
        return f"{prompt}{joint}{answer}"
    if not prompt or not answer or prompt[-1].isspace():
        return prompt + answer
    last, first = prompt[-1], answer[0]
    tight = (
        bool(_OPENS.search(prompt) or _ELIDED.match(prompt) or _CLOSES.match(answer))
        or (last in QUOTES and _opens_quote(prompt))
        or (first in QUOTES and not answer[1:2].isalnum() and prompt.count(first) % 2 == 1)
        or (last == ":" and answer.startswith("//"))
        or bool(_WIDE.match(last) or _WIDE.match(first))
        or bool(_NO_BLANKS.match(last) and (_NO_BLANKS.match(first) or first.isdigit()))
        or bool(_NO_BLANKS.match(first) and last.isdigit())
        or ((first.islower() or first == "_") and bool(_DOTTED.search(prompt)))
        or any(re.search(before, prompt) and re.match(then, answer) for before, then in _NUMBER)
    )
    return prompt + answer if tight else f"{prompt} {answer}"


#: Straight quotes, which open and close alike.
QUOTES = "\"'`"


def _opens_quote(prompt: str) -> bool:
    """Whether the straight quote at the end of `prompt` opens: it is the first, third, ... of its
    kind that is no apostrophe within a word, and stands behind no word but the prefix of a string
    in Python.
    """
    quote = re.escape(prompt[-1])
    return len(re.findall(rf"(?<!\w){quote}|{quote}(?!\w)", prompt)) % 2 == 1 and not re.search(
        rf"(?<!\w)(?!(?:[fbru]|[fb]r|r[fb]){quote}$)\w+{quote}$", prompt, re.IGNORECASE
    )


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices grouped by similar length so that `rows x longest` stays within `budget` padded
    tokens.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[i] <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
