"""A server on 127.0.0.1 that draws a JPEG for any COCO picture name, and misbehaves where it is told to.

It is a forward proxy too: a request for a whole address is answered as if it came for the path alone.
"""
import hashlib
import io
import re
import socket
import sys
import threading
import time
from contextlib import suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from PIL import Image, ImageDraw

PICTURE_PATH = re.compile(r"/(train2014|val2014)/COCO_\1_\d{12}\.jpg")
PAGE = b"<!doctype html><html><body>Please log in</body></html>"


def draw_jpeg(name, size=None):
    """JPEG bytes of a picture that depends on its name alone."""
    digest = hashlib.sha256(name.encode()).digest()
    width, height = size or (48 + digest[0] % 32, 48 + digest[1] % 32)
    picture = Image.new("RGB", (width, height), tuple(digest[2:5]))
    ImageDraw.Draw(picture).ellipse((width // 4, height // 4, width // 2, height // 2), fill=tuple(digest[5:8]))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG")
    return buffer.getvalue()


class PictureServer(ThreadingHTTPServer):
    """`with PictureServer() as server:` serves at `server.url`; `server.paths` lists what was asked for.

    `server.times` (monotonic seconds), `server.ranges` (the Range headers, None without) and `server.hosts` go with it.
    `files` maps further paths to their bytes, which are served by range where `ranges` holds. `faults` maps a file name
    to what its first requests meet: a status such as 503, one with headers such as (429, {"Retry-After": "1"}), or the
    name of one of Handler's methods fault_NAME. `delay` is a wait before each answer in seconds; beyond `most_at_once`
    requests at a time the answer is 503. `tls` is a server-side SSL context for CONNECT.
    """
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, files=None, faults=None, ranges=True, delay=0, most_at_once=None, tls=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files, self.paths, self.times, self.ranges, self.hosts = files or {}, [], [], [], []
        self.faults = {name: iter(answers) for name, answers in (faults or {}).items()}
        self.knows_ranges, self.delay, self.most_at_once, self.tls = ranges, delay, most_at_once, tls
        self.num_at_once, self.lock = 0, threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that hangs up early is no news; anything else is printed."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def draw(self, path, name):
        return draw_jpeg(name) if PICTURE_PATH.fullmatch(path) else None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open, as the real server's do
    disable_nagle_algorithm = True

    def do_GET(self):
        server, address = self.server, urlsplit(self.path)
        with server.lock:
            server.paths.append(address.path)
            server.times.append(time.monotonic())
            server.ranges.append(self.headers.get("Range"))
            server.hosts.append(address.netloc or self.headers.get("Host"))
            server.num_at_once += 1
            too_many = server.most_at_once and server.num_at_once > server.most_at_once
        try:
            time.sleep(server.delay)
            self.respond(503 if too_many else None, address.path)
        finally:
            with server.lock:
                server.num_at_once -= 1

    def respond(self, fault, path):
        name = path.rpartition("/")[2]
        fault = fault or next(self.server.faults.get(name, iter(())), None)
        body = self.server.files.get(path)
        is_file = body is not None
        body = body if is_file else self.server.draw(path, name)
        if isinstance(fault, int | tuple):
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            self.answer(status, b"no", **headers)
        elif body is None:
            self.answer(404, b"not here")
        elif fault:
            getattr(self, f"fault_{fault}")(body)
        elif is_file and self.server.knows_ranges:
            self.answer_range(body)
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
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body) if announced is None else announced)} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def answer_range(self, body, keep=None):
        """The part of `body` that was asked for; with `keep`, only that many bytes of it, then the connection is closed."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start, size = int(asked[1]) if asked else 0, len(body)
        if asked and start >= size:
            return self.answer(416, b"", **{"Content-Range": f"bytes */{size}"})
        headers = {"Content-Range": f"bytes {start}-{size - 1}/{size}"} if asked else {}
        self.close_connection = keep is not None
        return self.answer(206 if asked else 200, body[start:][:keep], size - start,
                           **headers, ETag=f'"{hashlib.sha256(body).hexdigest()}"')

    def fault_html(self, body):
        self.answer(200, PAGE, **{"Content-Type": "text/html"})

    def fault_garbage(self, body):
        self.answer(200, hashlib.shake_128(body).digest(len(body)))

    def fault_bomb(self, body):
        """The picture after its header says that it is 8,000 pixels wide and high."""
        at = body.index(b"\xff\xc0") + 5
        self.answer(200, body[:at] + (8_000).to_bytes(2, "big") * 2 + body[at + 4:])

    def fault_empty(self, body):
        self.answer(200, b"")

    def fault_short(self, body):
        """Half of the body, announced as such."""
        self.answer(200, body[:len(body) // 2])

    def fault_cut(self, body):
        """Half of what was asked for, announced as whole; then the connection is closed."""
        if self.server.knows_ranges:
            asked = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            return self.answer_range(body, keep=(len(body) - asked) // 2)
        self.answer(200, body[:len(body) // 2], announced=len(body))
        self.close_connection = True

    def fault_reset(self, body):
        """A tenth of the body, then a TCP reset."""
        self.answer(200, body[:len(body) // 10], announced=len(body))
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.close_connection = True

    def fault_overlong(self, body):
        """All of the body, announced as 100 bytes less."""
        self.answer(200, body, announced=len(body) - 100)

    def fault_nolength(self, body):
        """All of the body, of no announced size, ended by closing the connection: legal, if old."""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def fault_badlength(self, body):
        self.answer(200, body, announced="many")
        self.close_connection = True

    def fault_huge(self, body):
        self.answer(200, body, announced=10**13)
        self.close_connection = True

    def fault_endless(self, body):
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):
            while True:
                self.wfile.write(body * 100)

    def fault_hangup(self, body):
        self.close_connection = True

    def fault_nonsense(self, body):
        self.wfile.write(b"\0\1\2 this is no HTTP\r\n\r\n")
        self.close_connection = True

    def fault_headers(self, body):
        """Header lines that no parser likes, before a whole body."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n: nothing\r\nwords without a colon\r\n\r\n" % len(body))
        self.wfile.write(body)
        self.close_connection = True

    def fault_drip(self, body):
        """The head at once, the body byte by byte."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.drip(body)

    def fault_driphead(self, body):
        self.drip(b"HTTP/1.1 200 OK\r\nX-Slow: " + b"a" * 1000)

    def fault_nohead(self, body):
        """Interim answers without end, at a decent rate."""
        self.close_connection = True
        with suppress(OSError):
            while True:
                self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                time.sleep(0.002)

    def drip(self, data):
        self.close_connection = True
        with suppress(OSError):
            for i in range(len(data)):
                self.wfile.write(data[i:i + 1])
                time.sleep(0.02)

    def fault_silent(self, body):
        """Half of the body, then nothing."""
        self.answer(200, body[:len(body) // 2], announced=len(body))
        time.sleep(4)
        self.close_connection = True

    def fault_redirect(self, body):
        self.server.files["/moved/" + self.path.rpartition("/")[2]] = body
        self.answer(302, PAGE, Location="../moved/" + self.path.rpartition("/")[2])

    def fault_loop(self, body):
        self.answer(301, b"", Location=self.path)

    def fault_nowhere(self, body):
        self.answer(302, b"", Location="file:///etc/hostname")

    def fault_later(self, body):
        """Retry-After as a date, one to two seconds ahead."""
        self.answer(503, b"", **{"Retry-After": formatdate(time.time() + 2, usegmt=True)})

    def log_message(self, *args):
        pass
