"""official.py: zips that come in pieces, from the wrong version, or with something bad inside."""
import gzip
import hashlib
import json
import random
import struct
import tracemalloc
import zipfile

import builder
import pytest
from builder import ANNOTATIONS, QUESTIONS, ZIPS, many_entries, serve_zips, write_official
from picture_server import PictureServer

from common.files import file_lock
from download import official
from download.official import read_json

run, local_and_quick = builder.run, builder.local_and_quick  # fixtures; every test uses the second
ZIP = ZIPS[QUESTIONS]


@pytest.fixture
def zips(tmp_path, monkeypatch):
    """{path: bytes} of the two zips as a server has them, their sums taken for the published ones."""
    files = serve_zips(write_official(tmp_path / "vqa", many_entries()))
    monkeypatch.setattr(official, "OFFICIAL_SHA256",
                        {path.rpartition("/")[2]: hashlib.sha256(body).hexdigest() for path, body in files.items()})
    monkeypatch.setattr(official, "CHUNK", 64)  # so that these small files come in many pieces too
    return files


@pytest.fixture
def fetch(run, zips, tmp_path):
    """fetch(server) -> printed text; fetch(server, status=2) -> the error line. The zips go to tmp_path / "new"."""
    def call(server, status=None):
        text = run("--vqa-dir", tmp_path / "new", "--base-url", f"{server.url}/vqa/", "--no-pictures", status=status)
        if status is None:
            found = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
            assert found == {path.rpartition("/")[2]: body for path, body in zips.items()}  # and no .part
            assert "kept 240\n" in text
        return text
    return call


def asked(server):
    """The Range headers of the requests for the zip of the questions."""
    return [wanted for path, wanted in zip(server.paths, server.ranges, strict=True) if path.endswith(ZIP)]


def leave_part(tmp_path, content):
    """What a killed run left of the zip of the questions."""
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / f"{ZIP}.part").write_bytes(content)


def test_official_zips_are_fetched_once_checked_and_kept(fetch, zips):
    with PictureServer(zips) as server:
        fetch(server)
        fetch(server)
        assert len(server.paths) == 2


def test_a_dropped_connection_costs_only_what_had_not_come(fetch, zips):
    size = len(zips[f"/vqa/{ZIP}"])
    with PictureServer(zips, faults={ZIP: ["cut", 503, "cut", "cut"]}) as server:
        fetch(server)
        half = size // 2
        quarter = half + (size - half) // 2
        assert asked(server) == [None, f"bytes={half}-", f"bytes={half}-", f"bytes={quarter}-",
                                 f"bytes={quarter + (size - quarter) // 2}-"]


def test_a_second_run_goes_on_where_the_first_stopped(fetch, zips, tmp_path):
    with PictureServer(zips, faults={ZIP: ["cut", 403]}) as server:
        error = fetch(server, status=2)
        assert "status 403" in error and "run again to go on" in error
        assert [path.name for path in (tmp_path / "new").iterdir()] == [f"{ZIP}.part"]
        fetch(server)
        assert asked(server) == [None, *2 * [f"bytes={len(zips[f'/vqa/{ZIP}']) // 2}-"]]


def test_a_whole_part_that_a_kill_left_unnamed_is_not_fetched(fetch, zips, tmp_path):
    leave_part(tmp_path, zips[f"/vqa/{ZIP}"])
    with PictureServer(zips) as server:
        fetch(server)
        assert asked(server) == []


def test_a_server_without_ranges_starts_the_file_anew(fetch, zips):
    with PictureServer(zips, faults={ZIP: ["cut", "cut"]}, ranges=False) as server:
        fetch(server)
        assert len(asked(server)) == 3


RESTARTS = {  # what lies there: how many requests the whole file then takes
    "another version": (lambda body: bytes(100) + body[100:500], 2),  # sum wrong, once more without a range
    "longer than the file": (lambda body: body + b"rest", 2),  # status 416
    "as long as the file": (lambda body: bytes(len(body)), 2),
}


@pytest.mark.parametrize("name", RESTARTS)
def test_a_part_that_does_not_fit_is_fetched_anew(fetch, zips, tmp_path, name):
    make, num_requests = RESTARTS[name]
    leave_part(tmp_path, make(zips[f"/vqa/{ZIP}"]))
    with PictureServer(zips) as server:
        fetch(server)
        assert len(asked(server)) == num_requests and asked(server)[-1] is None


def test_a_file_that_changes_on_the_server_between_two_pieces(fetch, zips, monkeypatch):
    """The second piece is of the published version, the first of an older one: they must not be joined."""
    old = {f"/vqa/{ZIP}": zips[f"/vqa/{ZIP}"][:4] + bytes(len(zips[f"/vqa/{ZIP}"]) - 4)}
    with PictureServer(zips | old, faults={ZIP: ["cut", 403]}) as server:
        fetch(server, status=2)
        server.files.update(zips)
        fetch(server)


def test_a_wrong_range_in_the_answer_starts_the_file_anew(fetch, zips, tmp_path):
    leave_part(tmp_path, zips[f"/vqa/{ZIP}"][:500])
    with PictureServer(zips, faults={ZIP: [(206, {"Content-Range": "bytes 400-401/9999"}), (206, {})]}) as server:
        fetch(server)
        assert asked(server) == ["bytes=500-", None, None]


@pytest.mark.parametrize("fault", ["html", "garbage", "empty"])
def test_a_page_in_place_of_the_rest_does_not_cost_what_is_there(fetch, zips, tmp_path, fault):
    """A hotel's log-in page has status 200 and knows no range: it replaced the 20 MB that had come."""
    leave_part(tmp_path, zips[f"/vqa/{ZIP}"][:500])
    with PictureServer(zips, faults={ZIP: 3 * [fault]}) as server:
        error = fetch(server, status=2)
        assert "it is no zip" in error and (fault != "html" or "<!doctype" in error)
        assert (tmp_path / "new" / f"{ZIP}.part").read_bytes() == zips[f"/vqa/{ZIP}"][:500]
        fetch(server)
        assert set(asked(server)) == {"bytes=500-"}


FATAL = {404: "status 404", 403: "status 403", 503: "status 503 (for 1 s)", 500: "status 500 (3 tries)",
         "html": "it is no zip but begins with b'<!doctype", "hangup": "Remote end closed connection",
         "huge": "a body of 10,000,000,000,000 bytes", "loop": "more than 5 redirects", "short": "its sha256 is"}


@pytest.mark.parametrize("fault", FATAL, ids=str)
def test_a_zip_that_cannot_be_had_is_one_line_with_the_remedy(fetch, zips, tmp_path, fault):
    with PictureServer(zips, faults={ZIP: 100 * [fault]}) as server:
        error = fetch(server, status=2)
    assert error.startswith("error: ") and error.count("\n") == 1
    for part in (FATAL[fault], f"--vqa-dir {tmp_path / 'new'}", QUESTIONS, f"{server.url}/vqa/{ZIP}", "--base-url"):
        assert part in error
    assert list((tmp_path / "new").iterdir()) == []


def test_an_official_zip_with_another_sha256_is_refused_and_deleted(fetch, zips, tmp_path):
    body = zips[f"/vqa/{ZIP}"]
    with PictureServer({f"/vqa/{ZIP}": body[:-1] + b"!"}) as server:
        error = fetch(server, status=2)
        assert len(server.paths) == 1
    assert f"the published one is {hashlib.sha256(body).hexdigest()}" in error and error.count("\n") == 1
    assert list((tmp_path / "new").iterdir()) == []


def test_the_published_sums_are_those_of_four_files():
    assert sorted(map(len, official.OFFICIAL_SHA256.values())) == [64] * 4


def test_a_zip_that_another_run_is_fetching_is_left_to_it(fetch, zips, tmp_path):
    leave_part(tmp_path, b"PK")
    with PictureServer(zips) as server, file_lock(tmp_path / "new" / f"{ZIP}.part", "never"):
        assert "another run is fetching it" in fetch(server, status=2) and server.paths == []


def test_a_refused_connection_is_one_line_too(run, tmp_path):
    error = run("--vqa-dir", tmp_path / "empty", "--base-url", "http://127.0.0.1:1/vqa", status=2)
    assert error.startswith("error: ") and error.count("\n") == 1 and "--base-url" in error
    assert "Connection refused" in error and list((tmp_path / "empty").iterdir()) == []


def pack(path, members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_only_the_expected_member_is_read_and_nothing_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    path = pack(folder / ZIP, {"../evil.json": "1", "/tmp/evil.json": "2", f"../{QUESTIONS}": "3", "evil\0": "4",
                               QUESTIONS: '{"questions": []}', "C:\\evil.json": "5"})
    assert read_json(path, QUESTIONS) == {"questions": []}
    assert [str(found.relative_to(tmp_path)) for found in tmp_path.rglob("*") if found.is_file()] == [f"a/b/{ZIP}"]
    with pytest.raises(ValueError, match="delete it"):
        read_json(pack(folder / ZIP, {f"../{QUESTIONS}": "{}"}), QUESTIONS)


def with_lie(path, size):
    """The zip at `path` after its directory says that its one member unpacks to `size` bytes."""
    body = bytearray(path.read_bytes())
    at = body.rindex(b"PK\1\2") + 24
    body[at:at + 4] = struct.pack("<I", size)
    path.write_bytes(body)
    return path


BOMB = b"[" + b" " * 30_000_000 + b"]"
BOMBS = {
    "zip": lambda folder: pack(folder / ZIP, {QUESTIONS: BOMB}),
    "zip whose header lies": lambda folder: with_lie(pack(folder / ZIP, {QUESTIONS: BOMB}), 2000),
    "zip whose header exaggerates": lambda folder: with_lie(pack(folder / ZIP, {QUESTIONS: b"[]"}), 4_000_000_000),
    "gzip": lambda folder: write(folder / f"{QUESTIONS}.gz", gzip.compress(BOMB)),
    "json": lambda folder: write(folder / QUESTIONS, BOMB),
    "other method": lambda folder: pack(folder / ZIP, {QUESTIONS: b"[]"}, zipfile.ZIP_LZMA),
}


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr(official, "MAX_JSON_BYTES", 2_000_000)
    path = BOMBS[name](tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as refused:
            read_json(path, QUESTIONS)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert str(path) in str(refused.value) and "delete it" in str(refused.value)


def test_a_large_official_file_is_no_bomb():
    assert official.MAX_JSON_BYTES > 2 * 356_000_000 and official.MAX_ZIP_BYTES > 2 * 21_708_861


@pytest.mark.parametrize("kind", ["zip", "gz", "json"])
def test_flipped_bytes_give_the_right_text_or_one_error(tmp_path, kind):
    """Of the damage that no check sum covers (plain JSON) some must go unseen here: the rows are checked after."""
    text = json.dumps({"questions": [entry[0] for entry in many_entries(20)]}).encode()
    path = {"zip": lambda: pack(tmp_path / ZIP, {QUESTIONS: text}),
            "gz": lambda: write(tmp_path / f"{QUESTIONS}.gz", gzip.compress(text, mtime=0)),
            "json": lambda: write(tmp_path / QUESTIONS, text)}[kind]()
    body, rng, num_refused = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(body)
        for _ in range(rng.choice((1, 1, 3))):
            damaged[rng.randrange(len(body))] = rng.randrange(256)
        path.write_bytes(damaged[:rng.randrange(len(body))] if rng.random() < 0.2 else damaged)
        try:
            assert read_json(path, QUESTIONS) == json.loads(text) or kind == "json"
        except ValueError as error:
            num_refused += 1
            assert str(path) in str(error)
    assert num_refused > 50


def test_annotations_and_questions_are_fetched_by_their_own_names(fetch, zips):
    with PictureServer(zips) as server:
        fetch(server)
        assert server.paths == [f"/vqa/{ZIPS[QUESTIONS]}", f"/vqa/{ZIPS[ANNOTATIONS]}"]
