"""Unit: the page of `knowedit try` answers this machine, and nobody else."""

from __future__ import annotations

import http.client
import json
import threading
from types import SimpleNamespace

import pytest

from knowedit.errors import KnowEditError
from knowedit.report.page import rendered
from knowedit.report.trial import Server

NASTY = "<script>alert(1)</script>"


class Asked:
    """A trial that repeats what it is asked."""

    model = SimpleNamespace(name=NASTY)
    edits = ()
    facts = ()
    has_chat = False

    def ask(self, prompt, *, chat=False, tokens=24):
        if prompt == "fail":
            raise RuntimeError("a fault")
        if not prompt:
            raise KnowEditError("the prompt is empty")
        return {"asked": prompt, "chat": chat, "tokens": tokens}


@pytest.fixture
def server():
    with Server(Asked()) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def send(server, method="POST", path="/ask", body=None, **headers):
    """Status, headers and text of the answer."""
    line = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    named = {
        "Content-Type": "application/json",
        **{k.replace("_", "-"): v for k, v in headers.items()},
    }
    line.request(method, path, body, named)
    answer = line.getresponse()
    text = answer.read().decode()
    line.close()
    return answer.status, dict(answer.getheaders()), text


def test_the_page_escapes_what_it_shows_and_asks_nobody_else(server):
    status, headers, page = send(server, "GET", "/")
    assert status == 200 and NASTY not in page and "&lt;script&gt;alert" in page
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "http://" not in page and "https://" not in page and "innerHTML" not in page
    assert "Python" not in headers["Server"]


def test_a_question_is_answered(server):
    body = json.dumps({"prompt": "Who?", "chat": True, "tokens": 3})
    status, headers, text = send(server, body=body)
    assert status == 200 and headers["Content-Type"] == "application/json"
    assert json.loads(text) == {"asked": "Who?", "chat": True, "tokens": 3}


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({"body": '{"prompt": "x"}', "Host": "evil.example"}, 403),
        ({"body": '{"prompt": "x"}', "Content_Type": "text/plain"}, 415),
        ({"path": "/../etc/passwd", "method": "GET"}, 404),
        ({"body": "x" * 70_000}, 413),
        ({"body": "{"}, 400),
        ({"body": '["x"]'}, 400),
        ({"body": '{"prompt": ""}'}, 400),
        ({"body": '{"prompt": "fail"}'}, 500),
    ],
)
def test_anything_else_is_refused_with_a_reason(server, request_, status):
    found, _, text = send(server, **request_)
    assert found == status and json.loads(text)["error"]


def test_it_listens_on_this_machine_only(server):
    assert server.server_address[0] == "127.0.0.1" and server.address.startswith(
        "http://127.0.0.1:"
    )


@pytest.mark.parametrize("count, said", [(1, "Written: "), (4, "Written, among others: ")])
def test_it_says_whether_more_was_written(count, said):
    facts = [f"A{i} is B" for i in range(count)]
    page = rendered(
        "try.html.j2", model="m", edits=[], facts=facts, first="", chat=False, longest=64
    )
    assert f"{said}A0 is B" in page
