"""kill -9 at any moment of mini_vqa_v2.py: what lies there is whole, and the next runs end in the same bytes."""
import hashlib
import os
import random
import signal
import time
from collections import Counter

import pytest
from builder import many_entries, serve_zips, start_script, write_official
from picture_server import PictureServer, draw_jpeg

# official.py with other sums; with KILL_AT the process kills itself at that rename, after it where KILL_AFTER is 1
CODE = """
import json, os, signal, sys
import mini_vqa_v2, official, settings, throttle
official.OFFICIAL_SHA256 = json.loads(os.environ["SUMS"])
official.CHUNK = 64
throttle.WAITS = (0.02,) * 5
settings.sys.argv[0] = "mini_vqa_v2.py"
num_left, replace = int(os.environ.get("KILL_AT", 10**9)), os.replace

def replace_or_die(source, target):
    global num_left
    num_left -= 1
    if num_left < 0 and os.environ["KILL_AFTER"] == "1":
        replace(source, target)
    if num_left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = replace_or_die
settings.run(mini_vqa_v2.main, mini_vqa_v2.Config)
"""


class Build:
    """One data set built through zips and pictures from `server`, in folders that runs share."""

    def __init__(self, server, zips, folder):
        self.folder, self.zips = folder, zips
        self.flags = ["--vqa-dir", folder / "vqa", "--output-dir", folder / "out", "--base-url", f"{server.url}/vqa",
                      "--image-url", server.url, "--workers", 4]
        self.sums = ('{"' + '", "'.join(f'{path[5:]}": "{hashlib.sha256(body).hexdigest()}' for path, body in zips.items())
                     + '"}')

    def start(self, **environment):
        return start_script(*self.flags, code=CODE, SUMS=self.sums, **environment)

    def finish(self):
        """An undisturbed run; {path: bytes} of all that lies there after it."""
        _, error = (process := self.start()).communicate(timeout=120)
        assert process.returncode == 0, error
        return self.files()

    def files(self):
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}

    def check_whole(self, undisturbed):
        """Every file under its real name is the one of the undisturbed build; only the manifest may be behind."""
        for path, content in self.files().items():
            name = path.rpartition("/")[2]
            if name != "manifest.csv" and not name.startswith(".") and not name.endswith(".part"):
                assert content == undisturbed[path], path


@pytest.fixture
def server_and_zips(tmp_path):
    files = serve_zips(write_official(tmp_path / "source", many_entries()))
    with PictureServer(dict(files)) as server:
        yield server, files


@pytest.fixture
def undisturbed(server_and_zips, tmp_path):
    found = Build(*server_and_zips, tmp_path / "undisturbed").finish()
    images = [name for name in found if name.startswith("out/images/")]
    assert all(found[name] == draw_jpeg(name.rpartition("/")[2]) for name in images)
    assert len(images) == 120 and len(found) == 120 + 2 + 3  # two zips; manifest.csv, metadata.csv and qa_pairs.json
    return found


def test_a_kill_before_or_after_any_kind_of_rename_does_no_harm(server_and_zips, undisturbed, tmp_path):
    """In order: the first zip, the second, the manifest, pictures; then the manifest again, the JSON and the table."""
    build = Build(*server_and_zips, tmp_path / "killed")
    for kill_at, after in ((0, 0), (1, 1), (0, 0), (1, 0), (60, 1), (60, 0), (1, 1), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1)):
        process = build.start(KILL_AT=str(kill_at), KILL_AFTER=str(after))
        assert process.wait(60) == -signal.SIGKILL, process.stderr.read()
        process.communicate()
        build.check_whole(undisturbed)
    assert build.finish() == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_at_random_moments_end_in_the_same_bytes(server_and_zips, undisturbed, tmp_path):
    """25 kills of the whole process group, spread over runs that are slow enough to be hit anywhere."""
    server, zips = server_and_zips
    rng, hit, num_builds = random.Random(5), Counter(), 0
    server.delay = 0.04
    build = Build(server, zips, tmp_path / "0")
    while hit.total() < 25:
        server.faults = {path.rpartition("/")[2]: iter(["cut", "cut"]) for path in zips}
        process = build.start()
        process.stdout.readline()  # imports are over: settings are printed
        time.sleep(rng.uniform(0, 1.2))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            num_pictures = len(list(build.folder.glob("out/images/COCO*")))
            hit["texts" if num_pictures == 0 else "pictures" if num_pictures < 120 else "end"] += 1
        process.communicate()
        build.check_whole(undisturbed)
        if (build.folder / "out/metadata.csv").exists():
            assert build.finish() == undisturbed
            num_builds += 1
            build = Build(server, zips, tmp_path / str(num_builds))
    assert build.finish() == undisturbed
    print(f"{dict(hit)} kills, {num_builds + 1} builds")
    assert hit["texts"] >= 3 and hit["pictures"] >= 8, hit


def test_a_killed_run_lets_go_of_its_folder_at_once(server_and_zips, tmp_path):
    server, zips = server_and_zips
    server.delay = 0.05
    build = Build(server, zips, tmp_path / "held")
    process = build.start()
    while not (build.folder / "out" / "images").exists():
        time.sleep(0.01)
    second = build.start()
    _, error = second.communicate(timeout=60)
    assert second.returncode == 2 and "another run is writing to --output-dir" in error and error.count("\n") == 1
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    server.delay = 0
    build.finish()
