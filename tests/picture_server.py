"""A server on 127.0.0.1 that draws a JPEG for any COCO picture name, and misbehaves where it is told to."""
import hashlib
import io
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image, ImageDraw

PICTURE_PATH = re.compile(r"/(train2014|val2014)/COCO_\1_\d{12}\.jpg")


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

    `files` maps further paths to their bytes. `faults` maps a file name to what its first requests meet: a status
    such as 503, "html" (a page with status 200), "short" (half of the body, announced as such) or "cut" (half of the
    body, announced as whole).
    """
    daemon_threads = True

    def __init__(self, files=None, faults=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files, self.paths = files or {}, []
        self.faults = {name: iter(answers) for name, answers in (faults or {}).items()}

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that hangs up early is no news; anything else is printed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open, as the real server's do
    disable_nagle_algorithm = True

    def do_GET(self):
        self.server.paths.append(self.path)
        name = self.path.rpartition("/")[2]
        fault = next(self.server.faults.get(name, iter(())), None)
        body = self.server.files.get(self.path)
        if body is None and PICTURE_PATH.fullmatch(self.path):
            body = draw_jpeg(name)
        if isinstance(fault, int):
            self.answer(fault, b"no")
        elif body is None:
            self.answer(404, b"not here")
        elif fault == "html":
            self.answer(200, b"<html><body>Please log in</body></html>")
        elif fault == "short":
            self.answer(200, body[:len(body) // 2])
        elif fault == "cut":
            self.answer(200, body[:len(body) // 2], announced=len(body))
            self.close_connection = True
        else:
            self.answer(200, body)

    def answer(self, status, body, announced=None):
        self.send_response(status)
        self.send_header("Content-Length", str(announced or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass
