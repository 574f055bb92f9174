"""The small local page of `knowedit try`: a prompt, and what a model says with and without an edit.

It is served to this machine alone: on the loopback address, to requests that name it (a page of
another site that was resolved to it names another host), and only for JSON, which no form of
another site can send.
"""

from __future__ import annotations

import json
import logging
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from knowedit.edits.edit import Edit
from knowedit.errors import KnowEditError
from knowedit.evaluation.trial import LONGEST, Trial
from knowedit.models.tokens import join
from knowedit.report.page import rendered

LOOPBACK = "127.0.0.1"
#: Bytes of a request.
ROOM = 1 << 16
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)
logger = logging.getLogger(__name__)


class Server(ThreadingHTTPServer):
    """Serves one trial; `port` 0 takes a free one."""

    daemon_threads = True

    def __init__(self, trial: Trial, port: int = 0) -> None:
        self.trial = trial
        self.page = rendered(
            "try.html.j2",
            model=trial.model.name,
            edits=[_named(edit) for edit in trial.edits],
            facts=[join(fact.text, fact.new_answer) for fact in trial.facts[:20]],
            first=trial.facts[0].text if trial.facts else "",
            chat=trial.has_chat,
            longest=LONGEST,
        ).encode()
        super().__init__((LOOPBACK, port), Handler)
        self.hosts = {f"{name}:{self.server_port}" for name in (LOOPBACK, "localhost")}

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"http://{LOOPBACK}:{self.server_port}/"


def _named(edit: Edit) -> str:
    count = len(edit.facts)
    return f"{edit.method_name}, {count} fact{'s' * (count != 1)}"


class Handler(BaseHTTPRequestHandler):
    """`GET /`: the page; `POST /ask`: `{"prompt", "chat", "tokens"}` to `Trial.ask`."""

    server: Server
    server_version, sys_version = "knowedit", ""
    timeout = 60

    def do_GET(self) -> None:
        if self._is_ours("/"):
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)

    def do_POST(self) -> None:
        if not self._is_ours("/ask"):
            return
        if self.headers.get_content_type() != "application/json":
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send JSON")
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > ROOM:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {ROOM:,} bytes")
            return
        try:
            given = json.loads(self.rfile.read(int(length)))
            if not isinstance(given, dict) or "prompt" not in given:
                raise KnowEditError('send {"prompt": ..., "chat": ..., "tokens": ...}')
            options: dict[str, Any] = {
                name: given[name] for name in ("chat", "tokens") if name in given
            }
            found = self.server.trial.ask(given["prompt"], **options)
        except (ValueError, KnowEditError) as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except Exception as error:
            logger.exception("an answer failed")
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}")
        else:
            self._answer(HTTPStatus.OK, "application/json", json.dumps(found).encode())

    def _is_ours(self, path: str) -> bool:
        """Whether the request is for this server and this path; it is answered if not."""
        if self.headers.get("Host", "") not in self.server.hosts:
            self._refuse(HTTPStatus.FORBIDDEN, f"open {self.server.address}")
        elif self.path != path:
            self._refuse(HTTPStatus.NOT_FOUND, f"there is {self.server.address} only")
        else:
            return True
        return False

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self.close_connection = True
        self._answer(status, "application/json", json.dumps({"error": why}).encode())

    def _answer(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *values: Any) -> None:
        logger.info(format, *values)
