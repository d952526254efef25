"""A server on 127.0.0.1 that draws a JPEG for any COCO image name, with faults on request. It is a forward proxy too."""
import hashlib
import io
import re
import socket
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from PIL import Image, ImageDraw

IMAGE_PATH = re.compile(r"/(train2014|val2014|test2015)/COCO_\1_\d{12}\.jpg")
PAGE = b"<!doctype html><html><body>Please log in</body></html>"


def draw_jpeg(name):
    """JPEG bytes of an image that depends on its name alone."""
    digest = hashlib.sha256(name.encode()).digest()
    width, height = 48 + digest[0] % 32, 48 + digest[1] % 32
    image = Image.new("RGB", (width, height), tuple(digest[2:5]))
    ImageDraw.Draw(image).ellipse((width // 4, height // 4, width // 2, height // 2), fill=tuple(digest[5:8]))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


class ImageServer(ThreadingHTTPServer):
    """`with ImageServer() as server:` serves at `server.url`; `server.paths` and `server.hosts` list what was asked for.

    `files` maps further paths to their bytes. `faults` maps a file name to the faults of its first requests: a status
    such as 503, one with headers such as (429, {"Retry-After": "1"}), or a name in FAULTS.
    `delay` is a wait before each answer in seconds. With more than `max_at_once` requests at a time the answer is 503.
    `tls` is a server-side SSL context for CONNECT.
    """
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, files=None, faults=None, delay=0, max_at_once=1000, tls=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files, self.paths, self.hosts = files or {}, [], []
        self.faults = {name: iter(answers) for name, answers in (faults or {}).items()}
        self.delay, self.max_at_once, self.tls = delay, max_at_once, tls
        self.num_at_once, self.lock = 0, threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Print errors, but not of clients that close the connection early."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open, as those of the real server do
    disable_nagle_algorithm = True

    def do_GET(self):
        server, address = self.server, urlsplit(self.path)
        with server.lock:
            server.paths.append(address.path)
            server.hosts.append(address.netloc or self.headers.get("Host"))
            server.num_at_once += 1
            is_busy = server.num_at_once > server.max_at_once
        try:
            time.sleep(server.delay)
            self.respond(503 if is_busy else None, address.path)
        finally:
            with server.lock:
                server.num_at_once -= 1

    def respond(self, fault, path):
        name = path.rpartition("/")[2]
        fault = fault or next(self.server.faults.get(name, iter(())), None)
        body = self.server.files.get(path) or (draw_jpeg(name) if IMAGE_PATH.fullmatch(path) else None)
        if isinstance(fault, int | tuple):
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            self.answer(status, b"no", **headers)
        elif body is None:
            self.answer(404, b"not here")
        elif fault:
            FAULTS[fault](self, body)
        else:
            self.answer(200, body)

    def do_CONNECT(self):
        """Be the server that the client wants to talk to by TLS."""
        self.server.hosts.append(f"CONNECT {self.path}")
        self.send_response(200)
        self.end_headers()
        self.close_connection = False  # the request may be of HTTP/1.0, the tunnel stays
        self.connection = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", 0)

    def answer(self, status, body, announced=None, **headers):
        """Send a whole answer. If another length than the body's is announced, close the connection after it."""
        self.close_connection = announced is not None
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body) if announced is None else announced)} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def send_bytes(self, *pieces, seconds=0.0):
        """Send raw pieces with a pause after each, then close the connection."""
        self.close_connection = True
        with suppress(OSError):
            for piece in pieces:
                self.wfile.write(piece)
                time.sleep(seconds)

    def log_message(self, *args):
        pass


def say_it_is_huge(body):
    """The JPEG with a header that says that it is 20,000 pixels wide and high."""
    at = body.index(b"\xff\xc0") + 5
    return body[:at] + (20_000).to_bytes(2, "big") * 2 + body[at + 4:]


def reset(handler, body):
    """A tenth of the body, then a TCP reset."""
    handler.answer(200, body[:len(body) // 10], announced=len(body))
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def silent(handler, body):
    """Half of the body, then nothing."""
    handler.answer(200, body[:len(body) // 2], announced=len(body))
    time.sleep(4)


def redirect(handler, body):
    target = "/moved/" + handler.path.rpartition("/")[2]
    handler.server.files[target] = body
    handler.answer(302, PAGE, Location=f"..{target}")


OK = b"HTTP/1.1 200 OK\r\n"
FAULTS = {  # name: function of the handler and the image's bytes that answers
    "page": lambda handler, body: handler.answer(200, PAGE, **{"Content-Type": "text/html"}),
    "garbage": lambda handler, body: handler.answer(200, hashlib.shake_128(body).digest(len(body))),
    "bomb": lambda handler, body: handler.answer(200, say_it_is_huge(body)),
    "empty": lambda handler, body: handler.answer(200, b""),
    "half": lambda handler, body: handler.answer(200, body[:len(body) // 2]),  # and its length
    "broken": lambda handler, body: handler.answer(200, body[:len(body) // 2], announced=len(body)),  # breaks off
    "reset": reset,
    "overlong": lambda handler, body: handler.answer(200, body, announced=len(body) - 100),
    # HTTP allows this: the body ends where the connection closes
    "no_length": lambda handler, body: handler.send_bytes(OK + b"\r\n", body),
    "bad_length": lambda handler, body: handler.answer(200, body, announced="many"),
    "huge": lambda handler, body: handler.answer(200, body, announced=10**13),
    "endless": lambda handler, body: handler.send_bytes(OK + b"\r\n", *[body * 100] * 10**5),
    "hangup": lambda handler, body: handler.send_bytes(),
    "nonsense": lambda handler, body: handler.send_bytes(b"\0\1\2 this is not HTTP\r\n\r\n"),
    # header lines that cannot be parsed, then a whole body
    "bad_headers": lambda handler, body: handler.send_bytes(
        OK + b"Content-Length: %d\r\n: nothing\r\nno colon\r\n\r\n" % len(body), body),
    # the headers at once, then one byte after the other
    "drip": lambda handler, body: handler.send_bytes(
        OK + b"Content-Length: %d\r\n\r\n" % len(body), *(body[i:i + 1] for i in range(len(body))), seconds=0.02),
    "slow_headers": lambda handler, body: handler.send_bytes(OK + b"X-Slow: ", *[b"a"] * 1000, seconds=0.02),
    "silent": silent,
    "redirect": redirect,
    "loop": lambda handler, body: handler.answer(301, b"", Location=handler.path),
    "file": lambda handler, body: handler.answer(302, b"", Location="file:///etc/hostname"),
}
