"""OpenAI's Batch API on the loopback interface: files and batches in the formats that its server sends."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

from chat_server import Reply


@dataclass
class BatchServer:
    """`answer` gets a request's body and gives its reply; a batch ends as `status` after `polls` looks at it.

    `fail` may give a reply in place of the usual one, by method and path; `batches` are those that were created.
    """

    answer: Callable[[dict[str, Any]], Reply | None]
    polls: int = 1
    status: str = "completed"
    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)
    looks: dict[str, int] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    fail: Callable[[str, str], Reply | None] = lambda *_: None
    lock: Any = field(default_factory=Lock)

    def create(self, wanted: dict[str, Any]) -> dict[str, Any]:
        number = f"batch_{len(self.batches):024x}"
        lines = self.files[wanted["input_file_id"]].decode().splitlines()
        self.batches[number] = {
            "id": number,
            "object": "batch",
            "endpoint": wanted["endpoint"],
            "errors": None,
            "input_file_id": wanted["input_file_id"],
            "completion_window": wanted["completion_window"],
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": 1711471533,
            "in_progress_at": None,
            "expires_at": 1711557933,
            "finalizing_at": None,
            "completed_at": None,
            "failed_at": None,
            "expired_at": None,
            "cancelling_at": None,
            "cancelled_at": None,
            "request_counts": {"total": len(lines), "completed": 0, "failed": 0},
            "metadata": wanted.get("metadata"),
        }
        self.looks[number] = 0
        return self.batches[number]

    def look(self, number: str) -> dict[str, Any]:
        batch = self.batches[number]
        self.looks[number] += 1
        if self.looks[number] <= self.polls:
            batch["status"] = "in_progress"
        elif batch["status"] == "in_progress" or self.polls == 0:
            batch["status"] = self.status
            if self.status == "failed":
                error = {"code": "token_limit_exceeded", "message": "Enqueued token limit reached", "line": None}
                batch["errors"] = {"object": "list", "data": [error | {"param": None}]}
            else:
                self._end(batch)
        return batch

    def _end(self, batch: dict[str, Any]) -> None:
        done, failed = [], []
        for i, line in enumerate(map(json.loads, self.files[batch["input_file_id"]].decode().splitlines())):
            reply = self.answer(line["body"])
            row = {"id": f"batch_req_{i:024x}", "custom_id": line["custom_id"], "response": None, "error": None}
            if reply is None:
                message = "This request could not be executed before the completion window expired."
                failed.append(row | {"error": {"code": "batch_expired", "message": message}})
                continue
            response = {"status_code": reply.status, "request_id": f"{i:032x}", "body": json.loads(reply.body)}
            (done if reply.status == 200 else failed).append(row | {"response": response})
        for name, rows in (("output_file_id", done), ("error_file_id", failed)):
            if rows:
                batch[name] = f"file-{len(self.files):022d}"
                # In another order than they were sent.
                self.files[batch[name]] = "".join(json.dumps(row) + "\n" for row in reversed(rows)).encode()
        batch["request_counts"] |= {"completed": len(done), "failed": len(failed)}


@contextmanager
def batch_server(answer: Callable[[dict[str, Any]], Reply | None], **options: Any) -> Iterator[BatchServer]:
    served = BatchServer(answer, **options)

    class Handler(BaseHTTPRequestHandler):
        def reply(self, method: str, content: bytes) -> None:
            with served.lock:
                path = self.path.removeprefix("/v1").partition("?")[0]
                served.calls.append(f"{method} {path}")
                found = served.fail(method, path) or self.usual(method, path, content)
            self.close_connection = bool(found.fault)
            if found.fault:
                return
            self.send_response(found.status)
            self.send_header("Content-Type", found.content_type)
            self.send_header("Content-Length", str(len(found.body)))
            self.end_headers()
            self.wfile.write(found.body)

        def usual(self, method: str, path: str, content: bytes) -> Reply:
            if (method, path) == ("POST", "/files"):
                boundary = re.search("boundary=(.*)", self.headers["Content-Type"])
                assert boundary
                parts = content.split(b"--" + boundary[1].encode())
                (file,) = (part for part in parts if b'name="file"' in part)
                assert any(b'name="purpose"' in part and b"batch" in part for part in parts)
                number = f"file-{len(served.files):022d}"
                served.files[number] = file.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
                size = len(served.files[number])
                found: Any = {"id": number, "object": "file", "bytes": size, "created_at": 1, "filename": "f.jsonl"}
                found |= {"purpose": "batch", "status": "processed"}
            elif (method, path) == ("POST", "/batches"):
                found = served.create(json.loads(content))
            elif (method, path) == ("GET", "/batches"):
                found = {"object": "list", "data": list(served.batches.values()), "has_more": False}
            elif (method, path) == ("POST", "/chat/completions"):
                return served.answer(json.loads(content)) or Reply(500)
            elif path.startswith("/batches/"):
                found = served.look(path.removeprefix("/batches/"))
            else:
                number = path.removeprefix("/files/").removesuffix("/content")
                return Reply(body=served.files[number], content_type="application/octet-stream")
            return Reply(body=json.dumps(found).encode())

        def do_GET(self) -> None:
            self.reply("GET", b"")

        def do_POST(self) -> None:
            self.reply("POST", self.rfile.read(int(self.headers["Content-Length"])))

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
