"""A proxy before a Cloud Storage server that disturbs requests, for tests of faults."""

import contextlib
import http.client
import http.server
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator

# What happens to the request with this number: "503", "403", "reset", a delay in seconds, or None.
Fault = Callable[[int, str], str | float | None]


@contextlib.contextmanager
def proxy(url: str, fault: Fault, answers: list[tuple[str, int]] | None = None) -> Iterator[str]:
    """Runs a proxy of the server at `url` and yields its address.

    Args:
      url: the server.
      fault: called with the number of the request, from 1 on, and with "METHOD /path".
      answers: receives "METHOD /path" and the size in bytes of each answer of the server.
    """
    numbers, mutex = iter(range(1, 10**9)), threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            with mutex:
                number = next(numbers)
            line = f"{self.command} {urllib.parse.unquote(self.path)}"
            disturbance = fault(number, line)
            if disturbance == "reset":
                self.close_connection = True
                self.connection.close()
                return
            if disturbance in ("503", "403"):
                self.answer(int(disturbance), {}, b'{"error": {"message": "disturbed"}}')
                return
            if disturbance is not None:
                time.sleep(float(disturbance))
            connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc)
            headers = {
                name: value
                for name, value in self.headers.items()
                if name.lower() not in ("transfer-encoding", "connection", "content-length")
            }
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            content = response.read()
            if answers is not None:
                answers.append((line, len(content)))
            self.answer(response.status, dict(response.getheaders()), content)
            connection.close()

        def answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("transfer-encoding", "content-length", "date", "server"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = handle_any

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that went away is no error."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
