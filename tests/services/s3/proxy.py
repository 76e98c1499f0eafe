"""An HTTP proxy in front of the S3 server of the tests, which fails, waits, cuts and lies where it is told to."""

import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DROPPED = ("transfer-encoding", "content-length", "connection", "keep-alive", "date", "server")


@dataclass(frozen=True)
class Asked:
    """One request: its method, path with query, and Range header."""

    method: str
    path: str
    range: str | None


@dataclass(frozen=True)
class Fault:
    """What happens to requests that `hits`: an error status, a wait, a body that is cut or changed, a header left out.

    `cut` says the true length and ends early; `change` says the length of what it sends. `after`: the server has acted.
    """

    hits: Callable[[Asked], bool]
    times: int = 10**9
    status: int | None = None
    code: str = "InternalError"
    wait_s: float = 0.0
    cut: int | None = None
    change: Callable[[bytes], bytes] | None = None
    reset: bool = False
    after: bool = False
    ignores: str | None = None  # a header


@dataclass
class Proxy:
    """A running proxy; `faults` may be changed at any time, `seen` counts requests by method."""

    url: str
    faults: list[Fault] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    asked: list[Asked] = field(default_factory=list)
    used: Counter[int] = field(default_factory=Counter)
    guard: threading.Lock = field(default_factory=threading.Lock)

    def clear(self) -> None:
        """Forget faults and requests."""
        with self.guard:
            for counted in (self.faults, self.seen, self.asked, self.used):
                counted.clear()

    def fault(self, asked: Asked) -> Fault | None:
        """The fault that this request meets, counted."""
        with self.guard:
            self.seen[asked.method] += 1
            self.asked.append(asked)
            for fault in self.faults:
                if fault.hits(asked) and self.used[id(fault)] < fault.times:
                    self.used[id(fault)] += 1
                    return fault
        return None


def serve(server_port: int) -> tuple[ThreadingHTTPServer, Proxy]:
    """A proxy of 127.0.0.1:`server_port`, serving in threads; shut the server down when done."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        proxy: Proxy

        def log_message(self, *_: object) -> None:
            pass

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = self.proxy.fault(Asked(self.command, self.path, self.headers.get("Range")))
            if fault is not None:
                time.sleep(fault.wait_s)
                if not fault.after and (fault.reset or fault.status):
                    self.refuse(fault)
                    return
            onward = http.client.HTTPConnection("127.0.0.1", server_port, timeout=60)
            try:
                ignored = ((fault and fault.ignores) or "").lower()
                headers = {name: value for name, value in self.headers.items() if name.lower() != ignored}
                onward.request(self.command, self.path, body, headers)
                found = onward.getresponse()
                data = found.read()
            finally:
                onward.close()
            if fault is not None and (fault.reset or fault.status):
                self.refuse(fault)
                return
            if fault is not None and fault.change is not None:
                data = fault.change(data)
            length = found.headers.get("Content-Length") if self.command == "HEAD" else str(len(data))
            self.send_response(found.status)
            for name, value in found.headers.items():
                if name.lower() not in DROPPED:
                    self.send_header(name, value)
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault is not None and fault.cut is not None:
                self.wfile.write(data[: fault.cut])
                self.close_connection = True
                return
            self.wfile.write(data)

        def refuse(self, fault: Fault) -> None:
            self.close_connection = True
            if fault.reset:
                return
            data = f"<Error><Code>{fault.code}</Code><Message>told to</Message></Error>".encode()
            self.send_response(fault.status or 500)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer  # noqa: N815 - names of the standard library

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Handler.proxy = Proxy(f"http://127.0.0.1:{server.server_address[1]}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, Handler.proxy
