"""A loopback HTTP server for tests, and a proxy that does to answers what bad networks and busy stores do."""

import http.client
import socket
import struct
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass
class Answer:
    """An HTTP answer, and how its body is sent. length: what Content-Length says, if not the truth."""

    status: int
    headers: dict[str, str]
    body: bytes
    sent: int | None = None  # bytes of the body that go out before `end`
    end: str = ""  # then: "close", "reset" or "stall"


Fault = Callable[[Answer], Answer]


def status(code: int, name: str, **headers: str) -> Fault:
    """Another status; in the body, the error as S3 writes it."""
    text = f"<?xml version='1.0'?><Error><Code>{name}</Code><Message>{name} for test</Message></Error>".encode()
    return lambda answer: Answer(code, {"Content-Type": "application/xml", **headers}, text)


def broken(end: str) -> Fault:
    """The body ends half-way: the connection is closed, is reset, or stays open in silence."""
    return lambda answer: Answer(answer.status, answer.headers, answer.body, len(answer.body) // 2, end)


def short(answer: Answer) -> Answer:
    """A body that is shorter than what was asked for, and says so."""
    headers = {name: value for name, value in answer.headers.items() if name.lower() != "content-length"}
    return Answer(answer.status, headers, answer.body[: len(answer.body) // 2])


def etag(value: str) -> Fault:
    """Another ETag."""

    def change(answer: Answer) -> Answer:
        kept = {name: text for name, text in answer.headers.items() if name.lower() != "etag"}
        return Answer(answer.status, kept | {"ETag": value}, answer.body)

    return change


def fine(answer: Answer) -> Answer:
    """No fault this time."""
    return answer


@dataclass
class Server:
    """Answers from `serve(method, path, headers)`, through faults: per (method, path), one for each request in turn.

    requests: (method, path, range) of each, in order. always: faults of every request, for (method, path).
    """

    serve: Callable[[str, str, dict], Answer]
    faults: dict[tuple[str, str], deque[Fault]] = field(default_factory=lambda: defaultdict(deque))
    always: dict[tuple[str, str], Fault] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Server":
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                server._handle(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        class Httpd(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128  # more than the default 5: who finds it full tries again after a second

        self._httpd = Httpd(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._httpd.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self._httpd.shutdown()
        self._thread.join()
        self._httpd.socket.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._httpd.server_port}"

    def ranges(self, path: str) -> list[str | None]:
        """The ranges of all GETs of a path."""
        return [asked for method, of, asked in self.requests if method == "GET" and of == path]

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        path = urlsplit(handler.path).path
        self.requests.append((handler.command, path, handler.headers.get("Range")))
        answer = self.serve(handler.command, handler.path, dict(handler.headers))
        key = (handler.command, path)
        fault = self.faults[key].popleft() if self.faults[key] else self.always.get(key, fine)
        self._send(handler, fault(answer))

    def _send(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        handler.send_response(answer.status)
        if not any(name.lower() == "content-length" for name in answer.headers):
            handler.send_header("Content-Length", str(len(answer.body)))
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command == "HEAD":
            return
        try:
            handler.wfile.write(answer.body[: answer.sent])
            handler.wfile.flush()
        except OSError:  # the client has had enough
            answer.end = "close"
        if answer.end == "stall":
            self.stopped.wait(60)
        if answer.end == "reset":
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.shutdown(socket.SHUT_RD)
            handler.connection.close()
        if answer.end:
            handler.close_connection = True


def files(contents: dict[str, bytes], ranges: bool = True) -> Callable[[str, str, dict], Answer]:
    """Serve path → bytes, with ETag and If-Match; with ranges if wanted."""

    def serve(method: str, path: str, headers: dict) -> Answer:
        path = urlsplit(path).path
        if path not in contents:
            return Answer(404, {}, b"")
        body = contents[path]
        mark = f'"{hash(body):x}"'
        if headers.get("If-Match", mark) != mark:
            return Answer(412, {}, b"")
        answer = {"ETag": mark}
        if ranges:
            answer["Accept-Ranges"] = "bytes"
        if not ranges or "Range" not in headers:
            return Answer(200, answer | {"Content-Length": str(len(body))}, body)
        first, _, last = headers["Range"].removeprefix("bytes=").partition("-")
        first, last = int(first), min(int(last or len(body)), len(body) - 1)
        answer["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
        return Answer(206, answer, body[first : last + 1])

    return serve


def proxy(upstream: str) -> Callable[[str, str, dict], Answer]:
    """Serve what another server answers."""

    def serve(method: str, path: str, headers: dict) -> Answer:
        connection = http.client.HTTPConnection(urlsplit(upstream).netloc, timeout=30)
        try:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            body = response.read()
            dropped = ("transfer-encoding", "connection", "date", "server")
            kept = {name: value for name, value in response.getheaders() if name.lower() not in dropped}
            return Answer(response.status, kept, body)
        finally:
            connection.close()

    return serve
