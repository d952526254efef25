"""download/http.py and download/images.py: images from a server with every fault, one at a time and all together."""
import contextlib
import io
import itertools
import random
import socket
import threading
import time

import builder
import pytest
from builder import NAMES, ODD, assert_complete, many_entries, read_missing, write_official
from image_server import ImageServer, draw_jpeg
from PIL import Image
from test_fuzz import damage

from download import http, images
from download.http import check_address, download_body, open_session

run, short_waits, collect_from = builder.run, builder.short_waits, builder.collect_from  # fixtures


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(http, "TIMEOUTS", (5, 1))
    monkeypatch.setattr(images, "MAX_SECONDS", 1)
    monkeypatch.setattr(images, "MAX_IDLE_SECONDS", 3)


LASTING = {  # a fault at every request for one image: the reason in missing.csv, None if the image arrives
    404: "status 404", 403: "status 403", 410: "status 410", 204: "status 204", 206: "status 206", 304: "status 304",
    408: "status 408", 425: "status 425", 429: "status 429", 500: "status 500", 502: "status 502", 503: "status 503",
    "page": "not an image: 54 bytes that begin with b'<!doctype", "garbage": "not an image: {size} bytes that begin with",
    "empty": "not an image: 0 bytes", "half": "unreadable: Truncated File Read (3 tries)", "overlong": "unreadable: image file",
    "bomb": "unreadable: Image size (400000000 pixels) exceeds limit", "broken": "IncompleteRead({half} ", "reset": "3 tries",
    "no_length": None, "bad_length": None, "bad_headers": None, "redirect": None,
    "huge": "IncompleteRead({size} bytes read", "endless": "more than 33,554,432 bytes came",
    "hangup": "no answer: Remote end closed connection without response",
    "nonsense": r"no answer: \x00\x01\x02 this is not HTTP",
    "silent": "timed out", "drip": "bytes came within 1 s", "slow_headers": "no end after 3 s",
    "loop": "no answer: Exceeded 5 redirects", "file": "no answer: No connection adapters were found for 'file:///etc/hostname'"}


def test_a_lasting_fault_costs_one_image_and_the_reason_is_listed(collect_from, impatient, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(images, "MAX_MISSING_SHARE", 0.5)
    monkeypatch.setattr(images, "MAX_OUTAGES", 1000)
    names = dict(zip(LASTING, NAMES[2::3], strict=False))
    faults = {name: [fault] if fault == "redirect" else itertools.repeat(fault) for fault, name in names.items()}
    with ImageServer(faults=faults) as server:
        text = collect_from(server.url, "--workers", 16)
    assert caplog.records == []  # urllib3 logs retries, and tracebacks for bad header lines
    missing = read_missing(tmp_path / "out")
    for fault, reason in LASTING.items():
        size = len(draw_jpeg(names[fault]))
        found = missing.pop(names[fault], None)
        assert found == reason or reason.format(size=size, half=size // 2) in found and found.isprintable(), (fault, found)
    assert missing == {}
    num_lost = sum(reason is not None for reason in LASTING.values())
    assert len(list((tmp_path / "out" / "images").iterdir())) == 120 - num_lost
    assert f"{num_lost} of 120 images are missing" in text


def test_all_passing_faults_at_once_are_survived(collect_from, impatient, tmp_path):
    passing = [408, 425, 429, 500, 502, 503, 504, "page", "garbage", "empty", "half", "overlong", "broken", "reset", "hangup",
               "nonsense", "redirect", (503, {"Retry-After": "soon"}), (429, {"Retry-After": "0"})]
    with ImageServer(faults=dict(zip(NAMES[::5], [[fault] for fault in passing], strict=False))) as server:
        assert "missing," not in collect_from(server.url)
        assert len(server.paths) == 120 + len(passing)
    assert_complete(tmp_path / "out")


def test_one_percent_may_be_missing_and_a_later_complete_run_leaves_no_trace(collect_from, tmp_path):
    with ImageServer(faults={ODD: itertools.repeat(404)}) as server:
        text = collect_from(server.url)
    assert f"1 of 120 images are missing, for example {ODD} status 404; the whole list is in " in text
    assert "dropped 1: image missing or unreadable" in text and "kept 119\n" in text
    assert (tmp_path / "out" / "missing.csv").read_text() == f"name,reason\n{ODD},status 404\n"
    assert f"{ODD},0,,missing\n" in (tmp_path / "out" / "manifest.csv").read_text()
    with ImageServer() as server:
        collect_from(server.url)
        assert server.paths == [f"/train2014/{ODD}"]
    assert_complete(tmp_path / "out")


def test_more_than_one_percent_missing_stops_early_and_the_next_run_continues(collect_from, tmp_path):
    with ImageServer(faults={name: itertools.repeat(404) for name in NAMES[20:60:2]}, delay=0.005) as server:
        error = collect_from(server.url, expect=2)
        assert len(server.paths) < 60  # the second lost image is one too many, and 4 threads may be busy
    assert "at most 1% may be missing: check --image-url" in error and "missing.csv" in error
    missing = read_missing(tmp_path / "out")
    assert 50 < len(missing) < 110 and set(missing.values()) == {"status 404", "not tried"}
    assert not (tmp_path / "out" / "metadata.csv").exists()
    with ImageServer() as server:
        collect_from(server.url)
        assert {path.rpartition("/")[2] for path in server.paths} <= set(missing)
    assert_complete(tmp_path / "out")


def test_a_refused_port_fails_within_seconds_however_many_images_are_needed(run, tmp_path, monkeypatch):
    """1 % of many images, half a minute of retries for each: a dead server would take hours."""
    monkeypatch.setattr(http, "BACKOFF", 0.05)  # a tenth of the real waits
    folder = write_official(tmp_path / "vqa", many_entries(5000, 1))
    with ImageServer() as server:
        pass
    start = time.monotonic()
    error = run("--vqa-dir", folder, "--image-url", server.url, "--workers", 16, expect=2)
    assert "no answer: Connection refused" in error and time.monotonic() - start < 6
    assert "not tried" in read_missing(tmp_path / "out").values()


def test_one_image_that_is_always_busy_does_not_stop_the_others(collect_from, tmp_path):
    with ImageServer(faults={NAMES[0]: itertools.repeat(503)}) as server:
        collect_from(server.url, "--workers", 1)
    assert list(read_missing(tmp_path / "out")) == [NAMES[0]]


def test_a_server_that_answers_three_requests_at_a_time_serves_eight_threads(collect_from, tmp_path, monkeypatch):
    monkeypatch.setattr(http, "BACKOFF", 0.05)  # a tenth of the real waits, a tenth of a real server's time
    with ImageServer(max_at_once=3, delay=0.01) as server:
        assert "missing," not in collect_from(server.url, "--workers", 8)
    assert_complete(tmp_path / "out")


@pytest.mark.parametrize(("retry_after", "low", "high"), [("1", 0.9, 10), ("86400", 0.2, 5)])
def test_retry_after_is_obeyed_up_to_a_limit(collect_from, tmp_path, monkeypatch, retry_after, low, high):
    monkeypatch.setattr(http, "MAX_RETRY_AFTER", 1 if retry_after == "1" else 0.2)
    with ImageServer(faults={ODD: [(429, {"Retry-After": retry_after})]}) as server:
        start = time.monotonic()
        collect_from(server.url)
        assert low < time.monotonic() - start < high
    assert_complete(tmp_path / "out")


def test_postscript_is_not_decoded():
    """It is a program, which Pillow gives to another program to run."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(draw_jpeg(ODD))).save(buffer, "EPS")
    with pytest.raises(ValueError, match="not an image: .* begin with b'%!PS"):
        images.check_image(buffer.getvalue())


def damaged_answers(num):
    """Raw answers to a GET of one image, with damage to the header lines or to the body."""
    rng, body = random.Random(0), draw_jpeg(ODD)
    heads = [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body),
             b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body),
             b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/x\r\n\r\n",
             b"HTTP/1.1 503 Slow Down\r\nRetry-After: 1\r\nDate: Tue, 24 Nov 2026 12:00:00 GMT\r\n\r\n"]
    for _ in range(num):
        head, rest = rng.choice(heads), body + b"\r\n0\r\n\r\n"
        yield damage(head, rng) + rest if rng.random() < 0.5 else head + damage(rest, rng)


def test_any_answer_gives_a_body_or_a_value_error(monkeypatch):
    for name in ("MAX_REDIRECTS", "NUM_RETRIES"):  # each answer is for one request
        monkeypatch.setattr(http, name, 0)
    monkeypatch.setattr(http, "BODY_TRIES", 1)
    answers, ends = list(damaged_answers(400)), {"body": 0, "error": 0}
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        for answer in answers:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    with listener:
        for _ in answers:
            with open_session(1) as session:
                try:
                    download_body(session, f"http://127.0.0.1:{listener.getsockname()[1]}/a", images.MAX_IMAGE_BYTES, 5, len)
                    ends["body"] += 1
                except ValueError as error:
                    assert str(error).isprintable()
                    ends["error"] += 1
    assert min(ends.values()) > 50


@pytest.mark.parametrize("flag", ["--base-url", "--image-url"])
def test_a_bad_address_is_named_before_anything_is_done(run, tmp_path, flag):
    for address in ("ftp://127.0.0.1", "127.0.0.1:80", "http://", "http:///a", "http://[::1", "http://a:99999", "", "/images"):
        error = run("--vqa-dir", tmp_path / "vqa", flag, address, expect=2)
        assert error.startswith(f"error: {flag} '{address}' is not an address")
    assert list(tmp_path.iterdir()) == []
    for address in ("http://127.0.0.1", "https://[::1]:8080/a b", "HTTPS://user:secret@host/%20"):
        check_address(flag, address)


SECRET = "http://user:secret@127.0.0.1"


@pytest.mark.parametrize("flag, value", [
    ("--base-url", "{url}"), ("--base-url", f"{SECRET}:1"), ("--base-url", "ftp://user:secret@host"),
    ("--base-url", "user:sec@ret@host"), ("--image-url", "{url}/nothing"), ("--image-url", f"{SECRET}:1"),
    ("--base-url", "http://user:sec/ret@host"), ("HTTP_PROXY", f"{SECRET}:1"), ("HTTP_PROXY", "user:secret@")])
def test_passwords_in_addresses_are_not_printed(flag, value, collect_from, tmp_path, monkeypatch, capsys):
    with ImageServer() as server:
        value = value.format(url=f"http://user:secret@{server.url.removeprefix('http://')}")
        flags = ["--image-url", "http://a.invalid", "--vqa-dir", tmp_path / ("new" if flag == "--base-url" else "vqa")]
        if flag == "HTTP_PROXY":
            monkeypatch.setenv("HTTP_PROXY", value)
            monkeypatch.setenv("http_proxy", value)
        else:
            flags += [flag, value]
        for stream in ("stdout", "stderr"):
            monkeypatch.setattr(f"contextlib.redirect_{stream}", contextlib.nullcontext)  # capsys sees both
        monkeypatch.setattr("conftest.error_line", str)
        collect_from("http://a.invalid", *flags, expect=2)
    text = "".join(capsys.readouterr())
    assert "error: " in text and "user" not in text and "secret" not in text and "ret@" not in text, text
