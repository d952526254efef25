"""download/official.py: zips that break off, have another content than the published one, or hold something bad."""
import functools
import gzip
import hashlib
import itertools
import json
import re
import struct
import tracemalloc
import zipfile

import builder
import pytest
from builder import ANNOTATIONS, QUESTIONS, ZIPS, many_entries, serve_zips, write_official
from image_server import ImageServer
from test_fuzz import CASES, fuzz
from tqdm import tqdm

from download import official
from download.official import read_json

run, short_waits = builder.run, builder.short_waits  # fixtures
ZIP = ZIPS[QUESTIONS]


@pytest.fixture
def zips(tmp_path, monkeypatch):
    """{path: bytes} of the two zips on the server; their sums replace the published ones."""
    files = serve_zips(write_official(tmp_path / "vqa", many_entries()))
    monkeypatch.setattr(official, "SHA256",
                        {path.rpartition("/")[2]: hashlib.sha256(body).hexdigest() for path, body in files.items()})
    return files


@pytest.fixture
def fetch(run, zips, tmp_path):
    """fetch(server) -> printed text; fetch(server, expect=2) -> the error line. The zips go to tmp_path / "new"."""
    def call(server, expect=0):
        text = run("--vqa-dir", tmp_path / "new", "--base-url", f"{server.url}/vqa/", "--no-pictures", expect=expect)
        if expect == 0:
            found = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
            assert found == {path.rpartition("/")[2]: body for path, body in zips.items()}
            assert "kept 240\n" in text
        return text
    return call


def test_official_zips_are_downloaded_once_checked_and_kept(fetch, zips):
    with ImageServer(zips) as server:
        fetch(server)
        fetch(server)
        assert server.paths == [f"/vqa/{ZIPS[QUESTIONS]}", f"/vqa/{ZIPS[ANNOTATIONS]}"]


def test_a_full_disk_names_the_zip(fetch, zips, tmp_path, monkeypatch):
    def full(path, body):
        raise OSError(28, "No space left on device")
    with ImageServer(zips) as server:
        monkeypatch.setattr("pathlib.Path.write_bytes", full)
        assert fetch(server, expect=2) == f"error: [Errno 28] No space left on device: '{tmp_path / 'new' / ZIPS[QUESTIONS]}'"
    assert not list((tmp_path / "new").iterdir())


def test_a_download_that_breaks_off_is_repeated(fetch, zips):
    with ImageServer(zips, faults={ZIP: ["broken", 503, "page"]}) as server:
        fetch(server)
        assert len(server.paths) == 5


FATAL = {404: "status 404", 403: "status 403", 503: "status 503", "page": "not a zip: it begins with b'<!doctype",
         "hangup": "Remote end closed connection", "loop": "Exceeded 5 redirects", "half": "does not match the known hash"}


@pytest.mark.parametrize("fault", FATAL, ids=str)
def test_a_zip_that_cannot_be_downloaded_is_one_line_with_the_remedy(fetch, zips, tmp_path, fault):
    with ImageServer(zips, faults={ZIP: itertools.repeat(fault)}) as server:
        error = fetch(server, expect=2)
    for part in (FATAL[fault], f"--vqa-dir {tmp_path / 'new'}", QUESTIONS, f"{server.url}/vqa/{ZIP}", "--base-url"):
        assert part in error
    assert list((tmp_path / "new").iterdir()) == []


def test_a_zip_with_another_sha256_is_refused_and_deleted(fetch, zips, tmp_path):
    body = zips[f"/vqa/{ZIP}"]
    with ImageServer({f"/vqa/{ZIP}": body[:-1] + b"!"}) as server:
        error = fetch(server, expect=2)
    assert hashlib.sha256(body).hexdigest() in error and hashlib.sha256(body[:-1] + b"!").hexdigest() in error
    assert list((tmp_path / "new").iterdir()) == []


def test_the_progress_bar_of_a_zip_shows_bytes_and_rate(zips, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(official, "tqdm", functools.partial(tqdm, disable=False))
    with ImageServer(zips, faults={ZIP: ["broken"]}) as server:
        official.download_zip(f"{server.url}/vqa/{ZIP}", tmp_path / "zip", None)
    assert re.search(r"downloading: 100%.* [\d.]+k/[\d.]+k .*B/s\]", capsys.readouterr().err)


def test_a_refused_connection_is_one_line_too(run, tmp_path):
    error = run("--vqa-dir", tmp_path / "empty", "--base-url", "http://127.0.0.1:1/vqa", expect=2)
    assert "--base-url" in error and "Connection refused" in error and list((tmp_path / "empty").iterdir()) == []


def test_sums_and_limits_fit_the_official_files():
    assert sorted(map(len, official.SHA256.values())) == [64] * 5 and set(ZIPS.values()) < set(official.SHA256)
    assert official.MAX_JSON_BYTES > 2 * 356_000_000 and official.MAX_ZIP_BYTES > 2 * 21_708_861


def pack(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def write(path, content):
    path.write_bytes(content)
    return path


def test_only_the_expected_member_is_read_and_nothing_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = pack(tmp_path / ZIP, {"../evil.json": "1", "/tmp/evil.json": "2", f"../{QUESTIONS}": "3",
                                 QUESTIONS: '{"questions": []}', "C:\\evil.json": "5"})
    assert read_json(path, QUESTIONS) == {"questions": []}
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="delete it"):
        read_json(pack(tmp_path / ZIP, {f"../{QUESTIONS}": "{}"}), QUESTIONS)


def with_lie(path, size):
    """The zip at `path` after its directory says that its one member unpacks to `size` bytes."""
    body = bytearray(path.read_bytes())
    at = body.rindex(b"PK\1\2") + 24
    body[at:at + 4] = struct.pack("<I", size)
    return write(path, body)


BOMB = b"[" + b" " * 30_000_000 + b"]"
BOMBS = {
    "zip": lambda folder: pack(folder / ZIP, {QUESTIONS: BOMB}),
    "zip with a header that lies": lambda folder: with_lie(pack(folder / ZIP, {QUESTIONS: BOMB}), 2000),
    "gzip": lambda folder: write(folder / f"{QUESTIONS}.gz", gzip.compress(BOMB)),
    "json": lambda folder: write(folder / QUESTIONS, BOMB),
}


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


@pytest.mark.parametrize("kind", ["zip", "gz"])
def test_flipped_bytes_give_the_right_text_or_one_error(tmp_path, kind):
    """test_fuzz.py does the same for plain JSON, which has no checksum."""
    content = {"questions": [entry[0] for entry in many_entries(20)]}
    text = json.dumps(content).encode()
    path = (pack(tmp_path / ZIP, {QUESTIONS: text}) if kind == "zip" else
            write(tmp_path / f"{QUESTIONS}.gz", gzip.compress(text, mtime=0)))
    accepted = fuzz(path, lambda: read_json(path, QUESTIONS), kind)
    assert all(found == content for found in accepted) and len(accepted) < CASES / 2
