"""An OpenAI-compatible chat completions server on the loopback interface, which answers as a test tells it to."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Any, Literal


@dataclass(frozen=True)
class Reply:
    """What the server does with one request."""

    status: int = 200
    body: bytes = b""
    content_type: str = "application/json"
    fault: Literal["", "closes", "cuts", "hangs"] = ""
    headers: dict[str, str] = field(default_factory=dict)


def completion(content: Any) -> Reply:
    """A chat completion as OpenAI's server sends it."""
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    body = {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    return Reply(body=json.dumps(body).encode())


def error(status: int, message: str = "no", code: str | None = None) -> Reply:
    return Reply(status, json.dumps({"error": {"message": message, "type": "e", "code": code}}).encode())


@dataclass
class ChatServer:
    """`answer` gets a request's JSON and its number, from 0; `requests` and `keys` record what came.

    `models` are the names that it lists; with None it has no list.
    """

    answer: Callable[[dict[str, Any], int], Reply]
    models: list[str] | None = None
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)
    closing: Event = field(default_factory=Event)


@contextmanager
def chat_server(
    answer: Callable[[dict[str, Any], int], Reply], models: list[str] | None = None
) -> Iterator[ChatServer]:
    served = ChatServer(answer, models)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            listed = served.models is not None and self.path == "/v1/models"
            data = [{"id": name, "object": "model"} for name in served.models or ()]
            body = json.dumps({"object": "list", "data": data} if listed else {}).encode()
            self.send_response(200 if listed else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with served.lock:
                number = len(served.requests)
                served.requests.append(request | {"path": self.path})
                served.keys.append(self.headers["Authorization"])
            reply = served.answer(request, number)
            if reply.fault in ("closes", "hangs"):
                if reply.fault == "hangs":
                    served.closing.wait()
                self.close_connection = True
                return
            self.send_response(reply.status)
            self.send_header("Content-Type", reply.content_type)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            if reply.fault == "cuts":
                self.close_connection = True
                self.wfile.write(reply.body[: len(reply.body) // 2])
                return
            self.wfile.write(reply.body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield served
    finally:
        served.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
