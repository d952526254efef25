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

IMAGE_PATH = re.compile(r"/(train2014|val2014)/COCO_\1_\d{12}\.jpg")
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
    such as 503, one with headers such as (429, {"Retry-After": "1"}), or NAME of a method fault_NAME of Handler.
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
            getattr(self, f"fault_{fault}")(body)
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

    def fault_page(self, body):
        self.answer(200, PAGE, **{"Content-Type": "text/html"})

    def fault_garbage(self, body):
        self.answer(200, hashlib.shake_128(body).digest(len(body)))

    def fault_bomb(self, body):
        """The image with a header that says that it is 20,000 pixels wide and high."""
        at = body.index(b"\xff\xc0") + 5
        self.answer(200, body[:at] + (20_000).to_bytes(2, "big") * 2 + body[at + 4:])

    def fault_empty(self, body):
        self.answer(200, b"")

    def fault_half(self, body):
        """Half of the body, with its length."""
        self.answer(200, body[:len(body) // 2])

    def fault_cut(self, body):
        """Half of the body with the length of the whole body."""
        self.answer(200, body[:len(body) // 2], announced=len(body))

    def fault_reset(self, body):
        """A tenth of the body, then a TCP reset."""
        self.answer(200, body[:len(body) // 10], announced=len(body))
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    def fault_overlong(self, body):
        self.answer(200, body, announced=len(body) - 100)

    def fault_no_length(self, body):
        """No Content-Length: the body ends where the connection closes, which HTTP allows."""
        self.send_bytes(b"HTTP/1.1 200 OK\r\n\r\n", body)

    def fault_bad_length(self, body):
        self.answer(200, body, announced="many")

    def fault_huge(self, body):
        self.answer(200, body, announced=10**13)

    def fault_endless(self, body):
        self.send_bytes(b"HTTP/1.1 200 OK\r\n\r\n", *[body * 100] * 10**5)

    def fault_hangup(self, body):
        self.close_connection = True

    def fault_nonsense(self, body):
        self.send_bytes(b"\0\1\2 this is not HTTP\r\n\r\n")

    def fault_bad_headers(self, body):
        """Header lines that cannot be parsed, then a whole body."""
        self.send_bytes(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n: nothing\r\nno colon\r\n\r\n" % len(body), body)

    def fault_drip(self, body):
        """The headers at once, then one byte after the other."""
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
        self.send_bytes(head, *(body[i:i + 1] for i in range(len(body))), seconds=0.02)

    def fault_slow_headers(self, body):
        self.send_bytes(b"HTTP/1.1 200 OK\r\nX-Slow: ", *[b"a"] * 1000, seconds=0.02)

    def fault_silent(self, body):
        """Half of the body, then nothing."""
        self.answer(200, body[:len(body) // 2], announced=len(body))
        time.sleep(4)

    def fault_redirect(self, body):
        self.server.files["/moved/" + self.path.rpartition("/")[2]] = body
        self.answer(302, PAGE, Location="../moved/" + self.path.rpartition("/")[2])

    def fault_loop(self, body):
        self.answer(301, b"", Location=self.path)

    def fault_file(self, body):
        self.answer(302, b"", Location="file:///etc/hostname")

    def log_message(self, *args):
        pass
