"""collect.py and manifest.py: what a second run finds, two runs at once, interruptions, proxies, and no network at all."""
import hashlib
import io
import itertools
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time

import builder
import pytest
from builder import ANNOTATIONS, NO_PROXY, QUESTIONS, ZIPS, many_entries, read_rows, serve_zips, write_official
from picture_server import PictureServer, draw_jpeg
from PIL import Image
from test_download import NAMES, ODD, assert_complete, read_missing
from test_download import collect_from as collect_from_fixture

from common.files import file_lock
from download import images as collect
from download import official
from download.manifest import Manifest

run, local_and_quick, collect_from = builder.run, builder.local_and_quick, collect_from_fixture  # fixtures


@pytest.fixture
def whole(collect_from, tmp_path):
    """The output folder of a run that nothing disturbed."""
    with PictureServer() as server:
        collect_from(server)
    assert_complete(tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def no_network(monkeypatch):
    def connect(*args):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", connect)


class Nowhere:
    url = "http://pictures.invalid"


def test_a_second_run_needs_no_network_and_decodes_nothing(collect_from, whole, no_network, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in (whole / "images").iterdir()}
    monkeypatch.setattr(collect, "check_picture", lambda body: pytest.fail("decoded once more"))
    collect_from(Nowhere)
    assert {path: path.stat().st_mtime_ns for path in (whole / "images").iterdir()} == before
    assert_complete(whole)


def test_everything_in_place_needs_no_network_at_all(run, tmp_path, whole, no_network):
    """Not even for the text files, whatever their form; nor does a folder of an earlier version, without a manifest."""
    zips = builder.repack(tmp_path / "vqa", tmp_path / "zips", "zip")
    (whole / "manifest.csv").unlink()
    run("--vqa-dir", zips, "--base-url", Nowhere.url, "--image-url", Nowhere.url)
    assert_complete(whole)


def test_a_picture_that_was_missing_before_may_still_be_without_a_network(collect_from, tmp_path):
    with PictureServer(faults={ODD: itertools.repeat(404)}) as server:
        collect_from(server)
    before = (tmp_path / "out" / "metadata.csv").read_bytes()
    collect_from(server)
    assert (tmp_path / "out" / "metadata.csv").read_bytes() == before
    assert "Connection refused" in read_missing(tmp_path / "out")[ODD]


def damage_a_pixel(path):
    """Flip one byte of the picture's data: it can still be decoded."""
    body = bytearray(path.read_bytes())
    body[-30] ^= 1
    path.write_bytes(body)
    collect.check_picture(bytes(body))


DAMAGES = {"cut off": lambda path: path.write_bytes(path.read_bytes()[:300]), "deleted": lambda path: path.unlink(),
           "one bit": damage_a_pixel, "another picture": lambda path: path.write_bytes(draw_jpeg("another")),
           "empty": lambda path: path.write_bytes(b""), "a page": lambda path: path.write_bytes(b"<html>" * 50)}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_picture_is_noticed_and_only_that_is_fetched(collect_from, whole, name):
    DAMAGES[name](whole / "images" / ODD)
    with PictureServer() as server:
        collect_from(server)
        assert server.paths == [f"/train2014/{ODD}"]
    assert_complete(whole)


def test_a_damaged_picture_stays_damaged_until_it_comes_whole(collect_from, whole):
    """After a run without a server, one that knew no sum any more took the damaged picture for whole."""
    damage_a_pixel(whole / "images" / ODD)
    collect_from(Nowhere)
    assert list(read_missing(whole)) == [ODD] and len(read_rows(whole)) == 119
    size, digest = len(draw_jpeg(ODD)), hashlib.sha256(draw_jpeg(ODD)).hexdigest()
    assert f"{ODD},{size},{digest},missing\n" in (whole / "manifest.csv").read_text()
    with PictureServer() as server:
        collect_from(server)
        assert server.paths == [f"/train2014/{ODD}"]
    assert_complete(whole)


MANIFESTS = {"empty": lambda text: "", "cut in a line": lambda text: text[:-70], "header only": lambda text: text[:20],
             "garbage": lambda text: "\0\xff,,,\n" * 50, "twice": lambda text: text + text,
             "no new lines": lambda text: text.replace("\n", " "),
             "a wrong sum": lambda text: text.replace(",", ",1", 40), "CRLF": lambda text: text.replace("\n", "\r\n"),
             "an older line": lambda text: f"{ODD},3,{'0' * 64},ok\n" + text}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_in_any_state_does_no_harm(collect_from, whole, name):
    text = (whole / "manifest.csv").read_text()
    (whole / "manifest.csv").write_bytes(MANIFESTS[name](text).encode("latin-1"))
    with PictureServer() as server:
        collect_from(server)
        assert len(server.paths) <= 10
    assert_complete(whole)


def test_the_manifest_keeps_each_picture_from_the_moment_it_is_in_place(tmp_path):
    with Manifest(tmp_path / "manifest.csv") as manifest:
        manifest.record("b.jpg", 3, "1" * 64)
        manifest.record("a.jpg", 2, "0" * 64)
        killed = Manifest(tmp_path / "manifest.csv")  # as the next run would find it after a kill
        assert killed.pictures == {"b.jpg": (3, "1" * 64), "a.jpg": (2, "0" * 64)}
    with open(tmp_path / "manifest.csv", "a") as stream:
        stream.write("c.jpg,12,2222")  # the line that a kill cut off
    with Manifest(tmp_path / "manifest.csv") as manifest:
        manifest.record("c.jpg", 12, "2" * 64)
        assert list(Manifest(tmp_path / "manifest.csv").pictures) == ["a.jpg", "b.jpg", "c.jpg"]


def test_a_run_without_pictures_leaves_manifest_and_list_alone(run, whole, tmp_path):
    before = (whole / "manifest.csv").read_bytes()
    run("--vqa-dir", tmp_path / "vqa", "--no-pictures")
    assert (whole / "manifest.csv").read_bytes() == before


def test_what_killed_runs_left_is_removed_and_nothing_else(collect_from, tmp_path):
    images = tmp_path / "out" / "images"
    images.mkdir(parents=True)
    mine = [images / ".COCO_train2014_000000000001.77.tmp.jpg", tmp_path / "out" / ".metadata.77.tmp.csv",
            tmp_path / "out" / ".qa_pairs.123456.tmp.json", tmp_path / "out" / ".manifest.1.tmp.csv"]
    theirs = [images / ".notes.tmp.txt", tmp_path / "out" / ".metadata.csv.swp", tmp_path / "out" / "plan.77.tmp.csv"]
    for path in mine + theirs:
        path.write_text("x")
    with PictureServer() as server:
        collect_from(server)
    assert not any(path.exists() for path in mine) and all(path.exists() for path in theirs)


def test_the_second_of_two_runs_in_one_folder_is_refused(collect_from, whole):
    before = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    with file_lock(whole, "never"):
        error = collect_from(Nowhere, status=2)
    assert f"another run is writing to --output-dir {whole}" in error and error.count("\n") == 1
    assert {path.name: path.stat().st_mtime_ns for path in whole.iterdir()} == before


def test_a_full_disk_is_one_line_and_leaves_no_part_of_a_picture(collect_from, tmp_path, monkeypatch):
    def full(source, target):
        if target.name == ODD:
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    replace = os.replace
    with PictureServer() as server:
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            error = collect_from(server, status=2)
        assert "No space left on device" in error and error.count("\n") == 1
        assert all(path.read_bytes() == draw_jpeg(path.name) for path in (tmp_path / "out" / "images").iterdir())
        collect_from(server)
        assert len(server.paths) <= 120 + 1
    assert_complete(tmp_path / "out")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_an_interruption_in_a_long_pause_ends_the_run_at_once_and_says_how_to_go_on(tmp_path, number):
    folder = write_official(tmp_path / "vqa", many_entries(per_image=1))
    with PictureServer(faults={ODD: [(429, {"Retry-After": "60"})]}) as server:
        process = builder.start_script("--vqa-dir", folder, "--image-url", server.url, "--output-dir", tmp_path / "out")
        try:
            for line in process.stdout:
                if "status 429: waiting 60 s" in line:
                    break
            process.send_signal(number)
            start = time.monotonic()
            _, error = process.communicate(timeout=30)
        finally:
            process.kill()
        assert time.monotonic() - start < 20 and process.returncode == 130
    assert error.splitlines()[-1].startswith("interrupted with ") and error.endswith("run again to go on\n")
    assert "Traceback" not in error and not (tmp_path / "out" / "metadata.csv").exists()


def test_progress_tells_pictures_and_bytes_per_second_and_the_time_left(run_script, tmp_path):
    folder = write_official(tmp_path / "vqa", many_entries(per_image=1))
    with PictureServer(delay=0.02) as server:
        result = run_script("mini_vqa_v2.py", "--vqa-dir", folder, "--image-url", server.url, "--output-dir", tmp_path / "out",
                            TQDM_DISABLE="", **NO_PROXY)
    last = result.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("pictures: 100%") and "120/120" in last and "<" in last  # elapsed<left
    assert " pictures/s" in last and " MB/s" in last


def test_proxy_and_mirror_over_http(run_script, tmp_path, monkeypatch):
    """Hosts that do not exist are reached through HTTP_PROXY, and one that NO_PROXY names is not."""
    files = serve_zips(write_official(tmp_path / "vqa", many_entries(per_image=1)))
    with PictureServer(files) as server:
        result = run_script("mini_vqa_v2.py", "--vqa-dir", tmp_path / "new", "--output-dir", tmp_path / "out", "--base-url",
                            "http://zips.invalid/vqa", expect=2, HTTP_PROXY=server.url, http_proxy=server.url)
        assert "its sha256 is" in result.stderr and server.hosts == ["zips.invalid"]
        server.hosts.clear()
        run_script("mini_vqa_v2.py", "--vqa-dir", tmp_path / "vqa", "--output-dir", tmp_path / "out", "--image-url",
                   "http://pictures.invalid/", HTTP_PROXY=server.url, http_proxy=server.url)
        assert server.hosts == 120 * ["pictures.invalid"]
    assert_complete(tmp_path / "out")
    with PictureServer() as server:
        run_script("mini_vqa_v2.py", "--vqa-dir", tmp_path / "vqa", "--output-dir", tmp_path / "direct", "--image-url",
                   server.url, HTTP_PROXY="http://127.0.0.1:1", http_proxy="http://127.0.0.1:1", **NO_PROXY)
    assert_complete(tmp_path / "direct")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A PEM file with the key and self-signed certificate of pictures.invalid."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=pictures.invalid",
                    "-addext", "subjectAltName=DNS:pictures.invalid", "-keyout", folder / "key", "-out", folder / "cert"],
                   check=True, capture_output=True)
    (folder / "both.pem").write_bytes((folder / "key").read_bytes() + (folder / "cert").read_bytes())
    return folder / "both.pem"


def test_pictures_over_https_through_a_proxy_and_an_untrusted_certificate(run, tmp_path, monkeypatch, certificate):
    folder = write_official(tmp_path / "vqa", many_entries(per_image=1))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    flags = ["--vqa-dir", folder, "--image-url", "https://pictures.invalid"]
    with PictureServer(tls=context) as server:
        monkeypatch.setenv("HTTPS_PROXY", server.url)
        monkeypatch.setenv("https_proxy", server.url)
        error = run(*flags, status=2)
        assert "its certificate is not trusted (self" in error and error.count("\n") == 1
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        run(*flags)
        connects = [host for host in server.hosts if host.startswith("CONNECT")]
        assert set(connects) == {"CONNECT pictures.invalid:443"} and server.hosts.count("pictures.invalid") == 120
    assert_complete(tmp_path / "out")


def test_local_pictures_are_listed_and_checked_by_the_same_files(run, tmp_path, monkeypatch):
    folder = write_official(tmp_path / "vqa", many_entries(per_image=1))
    pictures = tmp_path / "coco"
    pictures.mkdir()
    for name in NAMES:
        (pictures / name).write_bytes(draw_jpeg(name))
    (pictures / ODD).write_bytes(b"<html>")
    (pictures / NAMES[61]).unlink()
    (pictures / NAMES[61]).mkdir()
    flags = ["--vqa-dir", folder, "--image-dir", pictures]
    run(*flags, status=2)
    assert read_missing(tmp_path / "out") == {ODD: "not a picture but a page of 6 bytes",
                                              NAMES[61]: "not a picture but a folder or device"}
    (pictures / NAMES[61]).rmdir()
    for name in (ODD, NAMES[61]):
        (pictures / name).write_bytes(draw_jpeg(name))
    run(*flags)
    assert_complete(tmp_path / "out")
    monkeypatch.setattr(collect, "check_picture", lambda body: pytest.fail("decoded once more"))
    run(*flags)
    assert_complete(tmp_path / "out")


def test_the_names_of_the_official_files_are_known_here_too():
    assert official.JSON_NAMES["questions"].format("train2014") == QUESTIONS
    assert official.ZIP_NAMES["annotations"].format("Train") == ZIPS[ANNOTATIONS]


@pytest.mark.parametrize(("form", "accepted"), [("JPEG", True), ("PNG", True), ("WEBP", True), ("GIF", True), ("TIFF", False),
                                                ("EPS", False), ("PPM", False)])
def test_only_the_usual_forms_of_a_picture_are_decoded(form, accepted):
    """PostScript is a program that Pillow has another program run, and rarer decoders raise anything."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(draw_jpeg(ODD))).save(buffer, form)
    if accepted:
        return collect.check_picture(buffer.getvalue())
    with pytest.raises(ValueError, match="not a picture but something else"):
        collect.check_picture(buffer.getvalue())
