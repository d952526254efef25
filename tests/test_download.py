"""download.py and throttle.py: one picture among many meets every fault of a network, then all of them do."""
import csv
import hashlib
import itertools
import random
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import builder
import pytest
from builder import many_entries, write_official
from picture_server import PictureServer, draw_jpeg

from download import http as download
from download import images as collect
from download import throttle
from download.http import ask, check_address, open_session, read_body, wanted_pause

run, local_and_quick = builder.run, builder.local_and_quick  # fixtures; every test uses the second
NAMES = [f"COCO_train2014_{image:012d}.jpg" for image in range(120)]
ODD = NAMES[60]


@pytest.fixture
def impatient(monkeypatch):
    """Time-outs of a second."""
    for name, value in (("TIMEOUTS", (5, 1)), ("SLOW_AFTER", 0.5), ("MAX_HEAD_SECONDS", 1)):
        monkeypatch.setattr(download, name, value)


@pytest.fixture
def collect_from(run, tmp_path):
    """collect_from(server, *flags) -> printed text; with status=2 -> the error line. Pictures go to tmp_path / "out"."""
    folder = write_official(tmp_path / "vqa", many_entries(per_image=1))

    def call(server, *flags, status=None):
        return run("--vqa-dir", folder, "--image-url", f"{server.url}/", *flags, status=status)
    return call


def read_missing(folder):
    with open(folder / "missing.csv", encoding="utf-8", newline="") as stream:
        return {row["name"]: row["reason"] for row in csv.DictReader(stream)}


def assert_complete(folder):
    """All 120 pictures, byte by byte, nothing else, and a manifest that says so."""
    found = {path.name: path.read_bytes() for path in (folder / "images").iterdir()}
    assert found == {name: draw_jpeg(name) for name in NAMES}
    assert sorted(path.name for path in folder.iterdir()) == ["images", "manifest.csv", "metadata.csv", "qa_pairs.json"]
    lines = [f"{name},{len(body)},{hashlib.sha256(body).hexdigest()},ok\n" for name, body in sorted(found.items())]
    assert (folder / "manifest.csv").read_text() == "".join(["name,bytes,sha256,status\n", *lines])


LASTING = {  # a fault that one picture meets at every try: the reason in missing.csv, None where it does no harm
    404: "status 404", 403: "status 403", 410: "status 410", 204: "status 204", 206: "status 206", 304: "status 304",
    408: "status 408 (3 tries)", 500: "status 500 (3 tries)", 503: "status 503 ", 502: "status 502 ", 429: "status 429 ",
    "html": "not a picture but a page of 54 bytes (3 tries)",
    "garbage": "not a picture but something else of {size} bytes (3 tries)",
    "empty": "not a picture but something else of 0 bytes (3 tries)",
    "short": "unreadable: Truncated File Read (3 tries)",
    "overlong": "unreadable: image file is truncated",
    "cut": "{half} of {size} bytes came (3 tries)", "reset": "of {size} bytes came (3 tries)",
    "badlength": None, "nolength": None,
    "huge": "a body of 10,000,000,000,000 bytes, more than 33,554,432", "endless": "a body of more than 33,554,432 bytes",
    "hangup": "no answer: Remote end closed connection without response", "headers": None,
    "nonsense": "no answer: ??? this is no HTTP", "silent": "no data for 1 s (3 tries)", "drip": "slow: ",
    "driphead": "no answer: slow: ",
    "nohead": "no answer: no end of the headers in ", "redirect": None, "loop": "more than 5 redirects",
    "bomb": "unreadable: 8000 x 8000 pixels, more than 50,000,000 (3 tries)",
    "nowhere": "No connection adapters were found for 'file:///etc/hostname'"}


def test_every_fault_that_lasts_costs_its_picture_and_is_listed_with_the_reason(collect_from, impatient, tmp_path,
                                                                                monkeypatch, caplog):
    monkeypatch.setattr(collect, "MAX_LOST_SHARE", 0.5)
    names = dict(zip(LASTING, NAMES[2::3], strict=False))
    faults = {name: [fault] if fault == "redirect" else itertools.repeat(fault) for fault, name in names.items()}
    with PictureServer(faults=faults) as server:
        collect_from(server, "--workers", 16)
    assert caplog.records == []  # urllib3 logs a traceback for header lines that it cannot parse
    missing, num_bytes = read_missing(tmp_path / "out"), {name: len(draw_jpeg(name)) for name in NAMES}
    for fault, reason in LASTING.items():
        name = names[fault]
        assert (name in missing) == (reason is not None), fault
        if reason is not None:
            size = num_bytes[name]
            assert reason.format(size=size, half=size // 2) in missing[name] and missing[name].isprintable(), fault
    assert set(missing) == {names[fault] for fault, reason in LASTING.items() if reason}
    assert len(list((tmp_path / "out" / "images").iterdir())) == 120 - len(missing)


def test_one_picture_in_a_hundred_may_be_missing_and_a_later_complete_run_leaves_no_trace(collect_from, tmp_path):
    with PictureServer(faults={ODD: itertools.repeat(404)}) as server:
        text = collect_from(server)
    assert f"1 of 120 pictures are lost ({ODD} status 404)" in text and "missing.csv" in text
    assert "dropped 1: picture missing or unreadable" in text and "kept 119\n" in text
    assert (tmp_path / "out" / "missing.csv").read_text() == f"name,reason\n{ODD},status 404\n"
    assert f"{ODD},0,,missing\n" in (tmp_path / "out" / "manifest.csv").read_text()
    with PictureServer() as server:
        collect_from(server)
        assert server.paths == [f"/train2014/{ODD}"]
    assert_complete(tmp_path / "out")


def test_all_passing_faults_at_once_are_survived(collect_from, impatient, tmp_path):
    passing = [408, 425, 429, 500, 502, 503, 504, "html", "garbage", "empty", "short", "overlong", "cut", "reset", "hangup",
               "nonsense", "silent", "drip", "redirect", (503, {"Retry-After": "soon"}), (429, {"Retry-After": "0"})]
    faults = dict(zip(NAMES[::5], [[fault] for fault in passing], strict=False))
    with PictureServer(faults=faults) as server:
        text = collect_from(server)
        assert len(server.paths) == 120 + len(passing)
    assert "lost" not in text
    assert_complete(tmp_path / "out")


def test_too_many_missing_pictures_fail_with_the_list_and_the_next_run_goes_on(collect_from, tmp_path):
    bad = dict.fromkeys(NAMES[20:60:2])
    with PictureServer(faults={name: itertools.repeat(404) for name in bad}) as server:
        error = collect_from(server, status=2)
        num_asked = len(server.paths)
    assert error.count("\n") == 1 and "at most 1% may be lost" in error and "--image-url" in error
    assert "missing.csv" in error and num_asked < 60  # the second lost one is one too many, and 4 threads may be at it
    missing, folder = read_missing(tmp_path / "out"), tmp_path / "out" / "images"
    assert sorted(missing) == sorted(set(NAMES) - {path.name for path in folder.iterdir()})
    reasons = [missing[name] for name in sorted(missing)]
    assert f"and {reasons.count('not tried: the run had failed')} were not tried any more; all that are missing" in error
    assert 2 <= reasons.count("status 404") <= 6 and set(reasons) == {"status 404", "not tried: the run had failed"}
    assert not (tmp_path / "out" / "metadata.csv").exists()
    with PictureServer() as server:
        collect_from(server)
        assert sorted(server.paths) == [f"/train2014/{name}" for name in sorted(missing)]
    assert_complete(tmp_path / "out")


def test_a_server_without_pictures_stops_the_run_early(run, tmp_path):
    folder = write_official(tmp_path / "vqa", many_entries(1000, 1))
    with PictureServer() as server:
        error = run("--vqa-dir", folder, "--image-url", f"{server.url}/elsewhere", status=2)
        assert 10 < len(server.paths) <= 11 + 4  # 11 lost ones are too many, and 4 threads may be at it
    assert "at most 1% may be" in error and "--image-url" in error and error.count("\n") == 1
    assert len(read_missing(tmp_path / "out")) == 1000
    assert not (tmp_path / "out" / "metadata.csv").exists()


def widest_gap(times):
    """(seconds, index of the request after it) of the longest silence between two requests."""
    return max((later - earlier, i) for i, (earlier, later) in enumerate(itertools.pairwise(times), 1))


@pytest.mark.parametrize("fault", [(429, {"Retry-After": "1"}), (503, {"Retry-After": "1"}), "later"], ids=str)
def test_all_threads_keep_quiet_for_as_long_as_the_server_asks(collect_from, tmp_path, fault):
    with PictureServer(faults={NAMES[10]: [fault]}, delay=0.002) as server:
        collect_from(server)
        seconds, index = widest_gap(server.times)
        assert 0.8 < seconds < 20 and 10 < index < 60  # a few threads may be at it when the answer comes
    assert_complete(tmp_path / "out")


def test_a_pause_is_capped_and_told(collect_from, tmp_path, monkeypatch):
    monkeypatch.setattr(throttle, "MAX_PAUSE", 0.2)
    monkeypatch.setattr(throttle, "TOLD_PAUSE", 0.1)
    with PictureServer(faults={NAMES[10]: [(429, {"Retry-After": "86400"})]}) as server:
        assert "status 429: waiting 0 s" in collect_from(server)
        assert widest_gap(server.times)[0] < 10
    assert_complete(tmp_path / "out")


def test_a_pause_that_ends_between_two_looks_at_the_clock_is_over(monkeypatch):
    """A thread that saw the pause run and then computed what was left of it, nothing, waited for ever."""
    looks = itertools.chain([9.999], itertools.repeat(10.001))
    monkeypatch.setattr(throttle.time, "monotonic", lambda: next(looks))
    quiet, begun = throttle.Throttle(1), threading.Event()
    quiet.quiet_until = 10

    def take_turn():
        with quiet.turn():
            begun.set()

    threading.Thread(target=take_turn, daemon=True).start()
    assert begun.wait(5)


NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


def pause_headers(text, date=None):
    return {"Retry-After": text} | ({"Date": format_datetime(date, usegmt=True)} if date else {})


@pytest.mark.parametrize(("headers", "seconds"), [
    ({}, 0), (pause_headers("7"), 7), (pause_headers(" 7 "), 7), (pause_headers("0"), 0), (pause_headers("-7"), 0),
    (pause_headers("1.5"), 0), (pause_headers("soon"), 0), (pause_headers("٣"), 0), (pause_headers("9" * 5000), 999999999),
    (pause_headers(format_datetime(NOW + timedelta(seconds=9), usegmt=True), NOW), 9),
    (pause_headers(format_datetime(NOW - timedelta(seconds=9), usegmt=True), NOW), 0),
    (pause_headers(format_datetime(datetime(2001, 1, 1, tzinfo=UTC), usegmt=True)), 0),
    (pause_headers("Tue, 99 Nov 2026 12:00:00 GMT"), 0), (pause_headers("Tue, 24 Nov 2026 12:00:00", NOW), 0),
], ids=[f"case {i}" for i in range(14)])
def test_retry_after_in_seconds_as_a_date_and_as_nonsense(headers, seconds):
    assert wanted_pause(headers) == seconds


def test_a_server_that_is_busy_beyond_three_requests_serves_sixteen_threads(collect_from, tmp_path, monkeypatch):
    """Retries that came back all at once met the same 503 as before, until their pictures counted as lost."""
    monkeypatch.setattr(throttle, "WAITS", (0.01, 0.02, 0.04, 0.08, 0.16))
    with PictureServer(most_at_once=3, delay=0.005) as server:
        assert "lost" not in collect_from(server, "--workers", 16)
        assert len(server.paths) < 2 * 120
    assert_complete(tmp_path / "out")


def test_a_burst_in_which_the_server_serves_nobody_is_waited_out(collect_from, tmp_path, monkeypatch):
    """It outlasts each picture's tries: the server is to blame, so no picture may be."""
    monkeypatch.setattr(throttle, "PATIENCE", (0.1, 20))
    with PictureServer(delay=0.002) as server:
        calm = server.most_at_once
        threading.Timer(0.05, lambda: setattr(server, "most_at_once", -1)).start()
        threading.Timer(0.60, lambda: setattr(server, "most_at_once", calm)).start()
        assert "lost" not in collect_from(server)
    assert_complete(tmp_path / "out")


def test_a_network_that_is_gone_ends_in_one_line_and_the_whole_list(collect_from, tmp_path):
    with PictureServer() as server:
        pass
    start = time.monotonic()
    error = collect_from(server, status=2)
    assert "no answer: Connection refused (for 0.05 s)" in error and error.count("\n") == 1
    assert time.monotonic() - start < 15 and list(read_missing(tmp_path / "out")) == NAMES
    with PictureServer() as server:
        collect_from(server)
    assert_complete(tmp_path / "out")


def test_once_patience_is_over_no_picture_waits_for_itself(collect_from, tmp_path, monkeypatch):
    """Each of the many pictures that had to fail waited for its own pause: half an hour of them."""
    monkeypatch.setattr(throttle, "WAITS", (0.1, 0.5))
    monkeypatch.setattr(collect, "MAX_LOST_SHARE", 0.5)
    with PictureServer() as server:
        pass
    start = time.monotonic()
    collect_from(server, status=2)
    assert time.monotonic() - start < 15 and list(read_missing(tmp_path / "out")) == NAMES


def test_once_patience_is_over_all_threads_find_that_out_at_the_same_time(monkeypatch):
    """A server that swallows connections costs each picture a time-out: one thread after the other took an hour."""
    slow = throttle.Throttle(16)
    for _ in range(3):
        slow.slow_down(throttle.Unavailable("no answer"))
        slow.quiet_until = 0
    assert slow.limit == 2
    monkeypatch.setattr(throttle, "PATIENCE", (0, 0))
    slow.slow_down(throttle.Unavailable("no answer"))
    assert slow.limit == 16 and slow.quiet_until <= time.monotonic()


def test_a_single_picture_that_is_always_busy_does_not_sink_the_others(collect_from, tmp_path):
    """With one thread nobody else is served meanwhile, which looks like a server that is down."""
    with PictureServer(faults={NAMES[0]: itertools.repeat(503)}) as server:
        collect_from(server, "--workers", 1)
    assert list(read_missing(tmp_path / "out")) == [NAMES[0]]


def test_a_body_without_end_is_left_early():
    with (PictureServer(files={"/a": b"x"}, faults={"a": ["endless"]}) as server, open_session(1) as session,
          pytest.raises(throttle.Refused, match="more than 1,000,000"), ask(session, f"{server.url}/a") as response):
        read_body(response, 1_000_000, 10)


def test_a_body_that_takes_too_long_at_a_decent_rate_is_given_up(monkeypatch):
    with PictureServer(files={"/a": b"x" * 200_000}, faults={"a": ["drip"]}) as server, open_session(1) as session:
        monkeypatch.setattr(download, "CHUNK", 4)
        with pytest.raises(throttle.Fault, match="not whole after 0.2 s"), ask(session, f"{server.url}/a") as response:
            read_body(response, 1_000_000, 0.2)


def test_connections_are_kept_and_shared(collect_from):
    connections = []

    class CountingServer(PictureServer):
        def process_request(self, request, client_address):
            connections.append(client_address)
            super().process_request(request, client_address)

    with CountingServer(faults={NAMES[5]: [404], NAMES[6]: [503]}) as server:
        collect_from(server)
    assert len(connections) <= 4  # as many as threads: a refusal closes none


def mutated_answers(num):
    """Raw answers to a GET of one picture, with bytes flipped, cut out and put in."""
    rng, body = random.Random(0), draw_jpeg(ODD)
    heads = [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body),
             b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body),
             b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/x\r\n\r\n",
             b"HTTP/1.1 503 Slow Down\r\nRetry-After: 1\r\nDate: Tue, 24 Nov 2026 12:00:00 GMT\r\n\r\n"]
    for _ in range(num):
        answer = bytearray(rng.choice(heads) + body + b"\r\n0\r\n\r\n")
        for _ in range(rng.choice((1, 2, 5))):
            at = rng.randrange(rng.choice((60, len(answer))))
            change = rng.choice((b"", b"\r\n", b"\0", b"\xff", b"99999999999", b":", rng.randbytes(3)))
            answer[at:at + rng.choice((0, 1, 4))] = change
        yield bytes(answer)


def test_no_answer_whatever_raises_anything_else(monkeypatch):
    """Whatever stands in an answer: a body, or Fault, Unavailable or Refused."""
    answers = list(mutated_answers(400))
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        for answer in answers:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    monkeypatch.setattr(download, "MAX_REDIRECTS", 0)  # each answer is for one request
    ends = {"body": 0, "error": 0}
    with listener:
        for _ in answers:
            with open_session(1) as session:
                try:
                    with ask(session, f"http://127.0.0.1:{listener.getsockname()[1]}/a") as response:
                        read_body(response, collect.MAX_PICTURE_BYTES, 5)
                    ends["body"] += 1
                except (throttle.Fault, throttle.Refused) as error:
                    assert str(error).isprintable()
                    ends["error"] += 1
    assert min(ends.values()) > 50


BAD_ADDRESSES = ["ftp://127.0.0.1", "127.0.0.1:80", "http://", "http:///a", "http://[::1", "http://a:99999", "", "/pictures"]


@pytest.mark.parametrize("flag", ["--base-url", "--image-url"])
@pytest.mark.parametrize("address", BAD_ADDRESSES, ids=[f"address {i}" for i in range(8)])
def test_an_address_that_is_none_is_named_before_anything_is_done(run, tmp_path, flag, address):
    error = run("--vqa-dir", tmp_path / "vqa", flag, address, status=2)
    assert error.startswith(f"error: {flag} '{address}' is no address") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_addresses_that_are_some():
    for address in ("http://127.0.0.1", "https://[::1]:8080/a b", "HTTPS://user:secret@host/%20"):
        check_address("--image-url", address)
