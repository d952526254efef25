"""download/images.py over several runs: what a second run finds, kills, interruptions, two runs at once, proxies, TLS."""
import hashlib
import itertools
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections import Counter

import builder
import pytest
from builder import ODD, assert_complete, many_entries, read_missing, read_rows, start_script, write_official
from conftest import call_script
from image_server import ImageServer, draw_jpeg

from download import images

run, short_waits, collect_from = builder.run, builder.short_waits, builder.collect_from  # fixtures
NOWHERE = "http://images.invalid"


@pytest.fixture
def whole(collect_from, tmp_path):
    """The output folder of an undisturbed run."""
    with ImageServer() as server:
        collect_from(server.url)
    assert_complete(tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("a connection was opened"))


def test_further_runs_need_no_network(collect_from, whole, no_network, tmp_path, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in (whole / "images").iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(images, "check_image", lambda body: pytest.fail("decoded again"))
        collect_from(NOWHERE)
        assert {path: path.stat().st_mtime_ns for path in (whole / "images").iterdir()} == before
        collect_from(NOWHERE, "--no-pictures")
        assert_complete(whole)
    # a killed run leaves no manifest: the images that are there and can be decoded count
    (whole / "manifest.csv").unlink()
    collect_from(NOWHERE, "--vqa-dir", builder.repack(tmp_path / "vqa", tmp_path / "zips", "zip"), "--base-url", NOWHERE)
    assert_complete(whole)


def test_an_image_that_was_missing_before_may_be_missing_without_a_network(collect_from, tmp_path):
    with ImageServer(faults={ODD: itertools.repeat(404)}) as server:
        collect_from(server.url)
    collect_from(server.url)
    assert read_missing(tmp_path / "out") == {ODD: "no answer: Connection refused"} and len(read_rows(tmp_path / "out")) == 119


def damage_a_pixel(path):
    """Flip one bit of the image data: the file can still be decoded."""
    body = bytearray(path.read_bytes())
    body[-30] ^= 1
    path.write_bytes(body)
    images.check_image(bytes(body))


DAMAGES = {"truncated": lambda path: path.write_bytes(path.read_bytes()[:300]), "deleted": lambda path: path.unlink(),
           "one bit": damage_a_pixel, "another image": lambda path: path.write_bytes(draw_jpeg("another")),
           "empty": lambda path: path.write_bytes(b"")}


@pytest.mark.parametrize("name", DAMAGES)
def test_only_a_damaged_image_is_downloaded_again(collect_from, whole, name):
    DAMAGES[name](whole / "images" / ODD)
    with ImageServer() as server:
        collect_from(server.url)
        assert server.paths == [f"/train2014/{ODD}"]
    assert_complete(whole)


def test_a_damaged_image_stays_damaged_until_it_is_downloaded(collect_from, whole):
    """A run without a server forgot the sha256, so the run after it accepted the damaged image."""
    damage_a_pixel(whole / "images" / ODD)
    collect_from(NOWHERE)
    assert list(read_missing(whole)) == [ODD] and len(read_rows(whole)) == 119
    body = draw_jpeg(ODD)
    assert f"{ODD},{len(body)},{hashlib.sha256(body).hexdigest()},missing\n" in (whole / "manifest.csv").read_text()
    with ImageServer() as server:
        collect_from(server.url)
        assert server.paths == [f"/train2014/{ODD}"]
    assert_complete(whole)


MANIFESTS = {"empty": lambda text: "", "truncated in a line": lambda text: text[:-70], "twice": lambda text: text + text,
             "garbage": lambda text: "\0\xff,,,\n" * 50, "no new lines": lambda text: text.replace("\n", " "),
             "wrong sizes": lambda text: text.replace(",", ",1", 40), "CRLF": lambda text: text.replace("\n", "\r\n")}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_damaged_manifest_does_no_harm(collect_from, whole, name):
    text = (whole / "manifest.csv").read_text()
    (whole / "manifest.csv").write_bytes(MANIFESTS[name](text).encode("latin-1"))
    with ImageServer() as server:
        collect_from(server.url)
        assert len(server.paths) <= 10
    assert_complete(whole)


def test_temporary_files_of_killed_runs_are_removed_and_nothing_else(collect_from, tmp_path):
    folder = tmp_path / "out" / "images"
    folder.mkdir(parents=True)
    ours = [folder / ".COCO_train2014_000000000001.4194305.tmp.jpg", tmp_path / "out" / ".metadata.4194305.tmp.csv"]
    theirs = [folder / ".notes.tmp.txt", tmp_path / "out" / ".metadata.csv.swp", tmp_path / "out" / "plan.77.tmp.csv"]
    for path in ours + theirs:
        path.write_text("x")
    with ImageServer() as server:
        collect_from(server.url)
    assert not any(path.exists() for path in ours) and all(path.exists() for path in theirs)


def test_a_full_disk_is_one_line_and_leaves_no_part_of_an_image(collect_from, tmp_path, monkeypatch):
    def full(source, target):
        if target.name == ODD:
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    replace = os.replace
    with ImageServer() as server:
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            assert "No space left on device" in collect_from(server.url, expect=2)
        time.sleep(0.5)  # for the requests that were running
        assert all(path.read_bytes() == draw_jpeg(path.name) for path in (tmp_path / "out" / "images").iterdir())
        collect_from(server.url)
        assert len(server.paths) <= 120 + 4
    assert_complete(tmp_path / "out")


class Build:
    """One data set built from the text files in `vqa_dir` and the images of `server`; its runs share `folder`."""

    def __init__(self, server, vqa_dir, folder):
        self.folder = folder
        self.flags = ["--vqa-dir", vqa_dir, "--output-dir", folder, "--image-url", server.url, "--workers", 4]

    def start(self):
        return start_script(*self.flags)

    def finish(self):
        """An undisturbed run in this process; {path: bytes} of all files after it."""
        call_script("mini_vqa_v2.py", *self.flags, cwd=self.folder.parent)
        return self.files()

    def files(self):
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_an_interruption_during_a_long_wait_ends_the_run_at_once(tmp_path, number):
    with ImageServer(faults={ODD: itertools.repeat((429, {"Retry-After": "60"}))}) as server:
        build = Build(server, write_official(tmp_path / "vqa", many_entries(per_image=1)), tmp_path / "out")
        process = build.start()
        while len(list(tmp_path.glob("out/images/COCO*"))) < 119:
            time.sleep(0.05)
        process.send_signal(number)
        started = time.monotonic()
        _, error = process.communicate(timeout=30)
        assert time.monotonic() - started < 10 and process.returncode == 130
        # a file that is complete is counted a moment later: on a busy machine the signal came between the two
        assert re.fullmatch(r"interrupted after downloading 11\d of 120 images: run again to continue\n", error)
        assert not (tmp_path / "out" / "metadata.csv").exists()
        server.faults.clear()
        del server.paths[:]
        build.finish()
        assert len(server.paths) == 1
    assert_complete(tmp_path / "out")


def test_the_progress_bar_shows_images_and_megabytes_per_second(run_script, tmp_path):
    folder = write_official(tmp_path / "vqa", many_entries(per_image=1))
    with ImageServer(delay=0.02) as server:
        result = run_script("mini_vqa_v2.py", "--vqa-dir", folder, "--image-url", server.url, "--output-dir", tmp_path / "out",
                            TQDM_DISABLE="")
    last = result.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("downloading images: 100%") and "120/120" in last and " images/s" in last and " MB/s" in last


def test_hosts_that_do_not_exist_are_reached_through_a_proxy(collect_from, tmp_path, monkeypatch):
    with ImageServer() as server:
        for name in ("HTTP_PROXY", "http_proxy"):
            monkeypatch.setenv(name, server.url)
        error = collect_from(NOWHERE, "--vqa-dir", tmp_path / "new", "--base-url", "http://zips.invalid/vqa", expect=2)
        assert "status 404" in error and server.hosts == ["zips.invalid"]
        collect_from(NOWHERE)
        assert server.hosts[1:] == 120 * ["images.invalid"]
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        (tmp_path / "out" / "images" / ODD).unlink()
        collect_from(server.url)  # 127.0.0.1 is in NO_PROXY
    assert_complete(tmp_path / "out")


@pytest.fixture
def certificate(tmp_path):
    """A PEM file with the key and self-signed certificate of images.invalid."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    key, certificate = tmp_path / "key", tmp_path / "cert"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=images.invalid",
                    "-addext", "subjectAltName=DNS:images.invalid", "-keyout", key, "-out", certificate],
                   check=True, capture_output=True)
    (tmp_path / "both.pem").write_bytes(key.read_bytes() + certificate.read_bytes())
    return tmp_path / "both.pem"


def test_https_through_a_proxy_needs_a_trusted_certificate(collect_from, tmp_path, monkeypatch, certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    with ImageServer(tls=context) as server:
        for name in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(name, server.url)
        assert "certificate verify failed: self" in collect_from("https://images.invalid", expect=2)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        collect_from("https://images.invalid")
        assert server.hosts.count("images.invalid") == 120 and "CONNECT images.invalid:443" in server.hosts
    assert_complete(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_at_random_moments_end_in_the_same_bytes(tmp_path):
    """25 kills of the whole process group, spread over slow runs. Only temporary files and the manifest may differ."""
    vqa_dir = write_official(tmp_path / "vqa", many_entries())
    rng, hit, num_builds = random.Random(5), Counter(), 0
    with ImageServer(delay=0.04) as server:
        undisturbed = Build(server, vqa_dir, tmp_path / "undisturbed").finish()
        assert len(undisturbed) == 120 + 4  # manifest.csv, metadata.csv and the two JSON files
        build = Build(server, vqa_dir, tmp_path / "0")
        while hit.total() < 25:
            process = build.start()
            process.stdout.readline()  # the settings are printed: all modules are imported
            time.sleep(rng.uniform(0, 1.4))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                num_images = len(list(build.folder.glob("images/COCO*")))
                hit["texts" if num_images == 0 else "images" if num_images < 120 else "end"] += 1
            process.communicate()
            for path, content in build.files().items():
                assert path == "manifest.csv" or path.rpartition("/")[2].startswith(".") or content == undisturbed[path], path
            if (build.folder / "metadata.csv").exists():
                assert build.finish() == undisturbed
                num_builds += 1
                build = Build(server, vqa_dir, tmp_path / str(num_builds))
        assert build.finish() == undisturbed
    print(f"{dict(hit)} kills, {num_builds + 1} builds")
    assert hit["images"] >= 8, hit


def test_a_killed_run_releases_its_folder_and_the_next_run_keeps_its_images(tmp_path):
    with ImageServer(delay=0.05) as server:
        build = Build(server, write_official(tmp_path / "vqa", many_entries(per_image=1)), tmp_path / "out")
        process = build.start()
        while len(list(build.folder.glob("images/COCO*"))) < 20:
            time.sleep(0.01)
        server.delay = 30  # the first run must not end before the second one has started
        _, error = (second := build.start()).communicate(timeout=60)
        assert second.returncode == 2 and "another run is writing to --output-dir" in error and error.count("\n") == 1
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        server.delay = 0
        build.finish()
        assert len(server.paths) <= 120 + 4
    assert_complete(tmp_path / "out")
