"""Unit: paraphrases from an endpoint, scripted to go wrong in every way; model: a real server for
the good path.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from knowedit.cli.study import _paraphrases
from knowedit.errors import KnowEditError
from knowedit.facts.wordings.paraphrase import (
    LENGTHS,
    ROUNDS,
    Endpoint,
    ParaphraseError,
    paraphrases,
    parse,
)
from knowedit.studies.arithmetic import Sum

LISTED = ["The sum of 2 and 2 is", "two plus two equals", "Q: What is 2+2? A:"]


def completion(content):
    """What a server answers with."""
    message = {"role": "assistant", "content": content}
    choices = [{"index": 0, "finish_reason": "stop", "message": message}]
    return json.dumps(
        {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}
    )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KNOWEDIT_CACHE", str(tmp_path))
    return tmp_path / "paraphrases"


@pytest.fixture
def server():
    """A local server that answers as scripted: (status, body) or a number of seconds to wait first;
    the last one repeats.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            script, seen = self.server.script, self.server.seen
            action = script[min(len(seen), len(script) - 1)]
            seen.append({"body": sent, "key": self.headers["Authorization"], "path": self.path})
            if isinstance(action, float):
                self.server.stop.wait(action)
                action = 200, completion(json.dumps(LISTED))
            status, body = action
            self.send_response(status)
            self.send_header(
                "Content-Type", "text/html" if body.startswith("<") else "application/json"
            )
            self.send_header("retry-after-ms", "5")
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *_):  # a client that hung up
            pass

    running = Quiet(("127.0.0.1", 0), Handler)
    running.seen, running.stop, running.script = (
        [],
        threading.Event(),
        [(200, completion(json.dumps(LISTED)))],
    )
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.stop.set()
    running.shutdown()
    thread.join()
    running.server_close()


def at(server, **settings):
    return Endpoint(
        f"http://127.0.0.1:{server.server_address[1]}/v1",
        "some-model",
        **{"timeout": 5.0, **settings},
    )


def test_asked_once_then_cached(server, cache, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret-7")
    endpoint = at(server, key_variable="SOME_KEY")
    assert paraphrases("2+2=", 3, endpoint) == LISTED
    (asked,) = server.seen
    assert asked["path"] == "/v1/chat/completions" and asked["key"] == "Bearer secret-7"
    assert (
        asked["body"]["model"] == "some-model"
        and "2+2=" in asked["body"]["messages"][-1]["content"]
    )
    assert [turn["role"] for turn in asked["body"]["messages"]] == ["user", "assistant", "user"]
    server.script = [(500, "{}")]
    assert (
        paraphrases("2+2=", 3, endpoint) == LISTED and len(server.seen) == 1
    )  # the endpoint is no longer needed
    (file,) = cache.iterdir()
    assert "secret-7" not in file.read_text()
    for other in (("2+2=", 2, endpoint), ("3+3=", 3, endpoint), ("2+2=", 3, at(server, retries=0))):
        if other[:2] != ("2+2=", 3):
            with pytest.raises(ParaphraseError, match="answered 500"):
                paraphrases(*other)
    file.write_text('{"paraphrases": ')  # damaged: asked for again
    with pytest.raises(ParaphraseError, match="answered 500"):
        paraphrases("2+2=", 3, at(server, retries=0))


def test_a_cached_list_is_of_one_target(server, cache):
    """What is asked for without giving one answer away may give away another."""
    kept = paraphrases("2+2=", 3, at(server), ("5", "five"))
    giving = next(word for word in kept[0].split() if word.isalpha())
    with pytest.raises(ParaphraseError):
        paraphrases("2+2=", 3, at(server), (giving,))
    for damage in ('{"paraphrases": "abc"}', '{"paraphrases": []}', '{"paraphrases": [1, 2, 3]}'):
        for file in cache.iterdir():
            file.write_text(damage)
        assert paraphrases("2+2=", 3, at(server), ("5", "five")) == kept


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_servers_are_asked_again(server, cache, status):
    server.script = [(status, '{"error": {"message": "busy"}}')] * 2 + server.script
    assert paraphrases("2+2=", 2, at(server)) == LISTED[:2] and len(server.seen) == 3
    server.script = [(status, '{"error": {"message": "busy"}}')]
    server.seen.clear()
    with pytest.raises(ParaphraseError, match=rf"some-model.*answered {status}.*the shipped ones"):
        paraphrases("3+3=", 2, at(server, retries=2))
    assert len(server.seen) == 3 and len(list(cache.iterdir())) == 1


def test_a_server_that_is_too_slow(server, cache):
    server.script = [30.0, *server.script]
    assert paraphrases("2+2=", 2, at(server, timeout=0.3, retries=1)) == LISTED[:2]
    server.script, server.seen[:] = [30.0], []
    with pytest.raises(ParaphraseError, match=r"no answer within 0\.2 s, 1 times"):
        paraphrases("3+3=", 2, at(server, timeout=0.2, retries=0))


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (200, "<html>Hello</html>", "no chat completion"),
        (200, '{"choices": ', "no chat completion"),
        (200, '{"choices": []}', "no chat completion"),
        (200, "[1, 2]", "no chat completion"),
        (200, completion(None), "content is NoneType"),
        (401, '{"error": {"message": "bad key"}}', "valid key into OPENAI_API_KEY"),
        (404, '{"error": {"message": "no such model"}}', "answered 404.*no such model"),
        (200, completion("I would rather not."), "only 0 of 2 usable.*no list"),
        (
            200,
            completion('["2+2 is 5", "two plus two is four", " 2 + 2 =", "??", 7]'),
            "only 0 of 2.*gives away '5'",
        ),
    ],
)
def test_nonsense_is_an_error_and_leaves_nothing(server, cache, status, body, said):
    server.script = [(status, body)]
    with pytest.raises(ParaphraseError, match=said):
        paraphrases("2+2=", 2, at(server, retries=1), ("5", "four"))
    assert not cache.exists() or not list(cache.iterdir())
    assert len(server.seen) == (ROUNDS if "usable" in said or "only" in said else 1)


def test_nobody_there(cache):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = Endpoint(
            f"http://127.0.0.1:{taken.getsockname()[1]}/v1", "m", retries=0, timeout=2
        )
        with pytest.raises(ParaphraseError, match="cannot be reached"):
            paraphrases("2+2=", 2, endpoint)
    with pytest.raises(KnowEditError, match="at least 1"):
        paraphrases("2+2=", 0, endpoint)


def test_enough_usable_ones_over_several_answers(server, cache):
    long = "x" * (LENGTHS[1] + 1)
    answers = [["A 2", "a  2!", long, "B 2"], ["A 2", "B two 2"], ["C"], ["C 2 and"]]
    server.script = [(200, completion(json.dumps(answer))) for answer in answers]
    refused = []

    def refuse(text):
        refused.append(text)
        return None if "2" in text else "no number"

    assert paraphrases("2+2=", 4, at(server), refuse=refuse) == ["A 2", "B 2", "B two 2", "C 2 and"]
    assert len(server.seen) == 4 and refused == [
        "A 2",
        "B 2",
        "B two 2",
        "C 2 and",
    ]  # too short, too long, twice: not asked


@pytest.mark.parametrize(
    ("answer", "texts"),
    [
        ('["a b", "c\\nd"]', ["a b", "c d"]),
        ('Sure [here]:\n```json\n["a", 3, "b"]\n```', ["a", "b"]),
        ("1. first one\n2) 'second'\nno\n- third  ", ["first one", "second", "third"]),
        ("[" * 5000, []),
        ("nothing", []),
    ],
)
def test_lists_are_found_in_answers(answer, texts):
    assert parse(answer) == texts


def test_a_study_asks_for_every_target(server, cache):
    """What gives either answer away, or does not name the operands, is refused; with 0 and 5 in the
    sum they are no answer.
    """
    given = [
        *LISTED,
        "two plus two is four, not",
        "2+2 makes 5:",
        "The answer is",
        "0 and 5 make",
        "zero plus five:",
        "5+0 is 3?",
    ]
    server.script = [(200, completion(json.dumps([*LISTED, *given])))]
    url = at(server).url
    own, source = _paraphrases(
        [Sum(2, 2, 5), Sum(0, 5, 3)], 2, url, "some-model", "OPENAI_API_KEY", 5.0
    )
    assert (
        own == {"2+2=5": LISTED[:2], "0+5=3": ["0 and 5 make", "zero plus five:"]}
        and source == f"some-model at {url}"
    )
    assert len(server.seen) == 2 and _paraphrases([], None, None, None, "", 1.0) == (
        None,
        "shipped, hand-written",
    )
    for half in ((2, None, None), (2, url, None), (None, url, None)):
        with pytest.raises(KnowEditError, match="--endpoint and --paraphrase-model"):
            _paraphrases([Sum(2, 2, 5)], *half, "OPENAI_API_KEY", 5.0)


@pytest.mark.model
def test_a_real_server(smollm_path, cache, tmp_path):
    """`transformers serve` with SmolLM2: found, answered, cached; then gone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", smollm_path]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as log:
        started = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            env=env,
            stdout=log,
            stderr=log,
        )
    try:
        await_health(started, f"http://127.0.0.1:{port}/health", tmp_path / "log")
        endpoint = Endpoint(
            f"http://127.0.0.1:{port}/v1",
            str(smollm_path),
            timeout=120,
            retries=0,
            tokens=80,
            temperature=0,
        )
        found = paraphrases("The largest ocean is", 2, endpoint, ("Pacific", "Atlantic"))
        assert len(set(found)) == 2 and all("ocean" in text for text in found)
        with pytest.raises(ParaphraseError, match="answered 4"):
            Endpoint(endpoint.url, "no/such-model", retries=0).ask(["Hello"], 0)
    finally:
        started.kill()
        started.wait()
    assert paraphrases("The largest ocean is", 2, endpoint, ("Pacific", "Atlantic")) == found
    with pytest.raises(ParaphraseError, match="cannot be reached"):
        paraphrases("The largest lake is", 2, endpoint)


def await_health(process, url, log):
    for _ in range(240):
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                assert answer.status == 200
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.25)
    raise AssertionError(f"no server: {log.read_text()}")
