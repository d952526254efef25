"""demo/app.py: the page is started once, with the demo's model, and asked by a client and in headless Chromium."""
import json
import os
import re
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from conftest import ROOT, start
from PIL import Image

from demo import app

CHECKPOINT = ROOT / "demo" / "vqa_checkpoint.pt"
QUESTION = "What is in the middle of the picture?"
ANSWER = "return document.querySelector('#answer strong')?.textContent"
PICTURE = "const e = document.querySelector('#why img'); return Boolean(e && e.complete && e.naturalWidth)"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# runs the page and prints every address that it connects to or asks a name server for
WATCHED = """
import runpy, sys
def watch(event, arguments):
    if event == "socket.connect" and not isinstance(arguments[1], str) or event == "socket.getaddrinfo":
        print("connects to", arguments[1][0] if event == "socket.connect" else arguments[0], flush=True)
sys.addaudithook(watch)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of the running page. At the end Ctrl-C stops it with one line."""
    pytest.importorskip("gradio", reason="gradio is not installed (requirements-app.txt)")
    folder = tmp_path_factory.mktemp("app")
    (folder / "temporary").mkdir()
    process = start("-c", WATCHED, ROOT / "demo/app.py", "--checkpoint", CHECKPOINT, "--port", free_port(), cwd=folder,
                    TMPDIR=str(folder / "temporary"), PYTHONWARNINGS="ignore",
                    no_proxy="", http_proxy="http://127.0.0.1:9")
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("open "):
            yield line.split()[1].rstrip("/")
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.endswith("interrupted\n")
    assert errors.count("\n") == 1 or errors.count("Traceback") == errors.count("InvalidPathError:"), errors
    assert not [path for path in (folder / "temporary").rglob("*") if path.is_file()], "the uploads are deleted"
    contacts = re.findall("^connects to (.*)", "".join(lines) + output, re.M)
    assert contacts and set(contacts) <= {"127.0.0.1", "localhost"}


@pytest.fixture(scope="module")
def ask(address):
    """ask(path, question) -> (HTML of the answer, whether there is a picture), as the button of the page does."""
    from gradio_client import Client, handle_file

    def ask(path, question):
        client = Client(address, verbose=False, analytics_enabled=False, download_files=False)
        text, picture = client.predict(path and handle_file(path), question, api_name="/ask")
        return text, picture is not None
    return ask


@pytest.fixture(scope="module")
def answerer():
    from evaluation.generation import load
    return load(CHECKPOINT)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return app.scene_examples(tmp_path_factory.mktemp("scenes"))


def test_two_people_at_once_get_their_own_answers(ask, answerer, scenes):
    with ThreadPoolExecutor(len(scenes)) as pool:
        found = list(pool.map(lambda example: ask(*example), scenes))
    assert found == [(app.describe(answerer(*example)), True) for example in scenes]
    assert len(set(found)) > 1


def write_image(folder, name, size):
    Image.new("L", size, 90).save(folder / name, compress_level=1)
    return str(folder / name)


@pytest.mark.parametrize("size", [(1, 1), pytest.param((7100, 7100), marks=pytest.mark.slow)],
                         ids=["one pixel", "50 megapixels"])
def test_an_image_of_an_odd_size_is_answered(size, ask, tmp_path):
    text, has_picture = ask(write_image(tmp_path, "odd.png", size), QUESTION)
    assert "<strong>" in text and has_picture


@pytest.mark.parametrize("name, question, expected", [
    (None, " ", "Choose an image and type a question about it."), (None, QUESTION, ">Choose an image.<"),
    ("good.png", " \n", ">Type a question about the image.<"),
    ("bad.png", QUESTION, "cannot identify image file 'bad.png'"), ("huge.png", QUESTION, "9500 x 9500 pixels are too many")])
def test_a_mistake_is_one_line_in_the_page(name, question, expected, ask, tmp_path):
    write_image(tmp_path, "good.png", (8, 8))
    (tmp_path / "bad.png").write_bytes(b"\x89PNG no image <b>")
    if name == "huge.png":
        write_image(tmp_path, "huge.png", (9500, 9500))
    text, has_picture = ask(name and str(tmp_path / name), question)
    assert not has_picture and expected in text.replace("&#x27;", "'")
    assert text.startswith('<p role="alert">') and text.count("<") == 2 and "\n" not in text


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}], ids=["without meta", "with meta"])
@pytest.mark.parametrize("place", ["{own}/private.png", "{own}/missing.png", "{own}/link.png", "{uploads}/link.png",
                                   "{uploads}/../../../{own}/private.png", "{uploads}/../../../{own}/missing.png"])
def test_only_uploads_are_read(place, meta, address, tmp_path, tmp_path_factory):
    """Whoever can open the page must not read other images of this machine through it. gradio checks no path without `meta`:
    the page drew the image into its explanation, and told whether there is such a file."""
    image = write_image(tmp_path, "private.png", (8, 8))
    uploads = next((tmp_path_factory.getbasetemp() / "app0/temporary").glob("tmp*/"))
    for folder in (tmp_path, uploads):
        (folder / "link.png").unlink(missing_ok=True)
        (folder / "link.png").symlink_to(image)
    path = place.format(own=os.path.relpath(tmp_path, uploads.parents[2]) if "../" in place else tmp_path, uploads=uploads)
    assert "missing" in place or os.path.samefile(path, image)
    data = {"data": [{"path": path} | meta, QUESTION]}
    event = requests.post(f"{address}/gradio_api/call/ask", json=data, timeout=60).json()["event_id"]
    stream = requests.get(f"{address}/gradio_api/call/ask/{event}", timeout=60).text
    assert "<strong>" not in stream and ".png" not in stream
    assert "This is no uploaded image." in stream or meta and "event: error" in stream
    assert requests.get(f"{address}/gradio_api/file={path}", timeout=60).status_code in (403, 404)


def wait_for(run, script):
    """What a JavaScript returns as soon as that is true."""
    until = time.monotonic() + 60
    while not (value := run(script)):
        assert time.monotonic() < until, f"{script}: not within a minute"
        time.sleep(0.05)
    return value


def click(browser, selector):
    browser.find_element("css selector", selector).click()


def test_the_page_in_a_browser(browser, address, answerer, scenes):
    """Upload an image, ask, read the answer, see why; then an example, and a mistake. Nothing leaves this machine."""
    run = browser.execute_script
    browser.get(address)
    wait_for(run, "return document.querySelector('#question textarea, #question input')")
    click(browser, "#ask")
    wait_for(run, "return document.querySelector('#answer [role=alert]')?.textContent.startsWith('Choose an image')")
    path, _ = scenes[0]
    browser.find_element("css selector", "input[type=file]").send_keys(path)
    browser.find_element("css selector", "#question textarea, #question input").send_keys(QUESTION + "\n")
    assert wait_for(run, ANSWER) == answerer(path, QUESTION).text
    wait_for(run, PICTURE)
    for example, question in scenes[1:3]:
        row = next(row for row in browser.find_elements("css selector", "#examples tr") if question in row.text)
        row.click()
        expected = answerer(example, question).text
        wait_for(run, f"return document.querySelector('#answer strong')?.textContent === {json.dumps(expected)}")
    assert run("return document.querySelector('#question textarea, #question input').value") == scenes[2][1]
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requested = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    own = [url for url in requested if url.startswith(f"{address}/")]
    assert len(own) > 10 and not [url for url in requested if url not in own and not url.startswith(("data:", "blob:"))]


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_a_phone_and_a_desktop(width, browser, address, scenes):
    """Nothing is wider than the page. On a desktop the answer is visible without scrolling, beside the image."""
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False})
    run = browser.execute_script
    browser.get(address)
    wait_for(run, "return document.querySelector('#examples td')")
    click(browser, "#examples td")
    wait_for(run, ANSWER)
    wait_for(run, PICTURE)
    assert run("return document.documentElement.scrollWidth") <= width
    bottom = run("return document.querySelector('#answer').getBoundingClientRect().bottom + scrollY")
    assert bottom < (300 if width == 1280 else 800)


# before the page is there

def test_examples_come_from_the_test_split(data_dir):
    from preprocess import read_rows
    tested = read_rows(data_dir).query("split == 'test'")
    examples = app.data_examples(data_dir)
    assert len({path for path, _ in examples}) == app.NUM_EXAMPLES
    assert {(path, question) for path, question in examples} <= {
        (str(data_dir / row.image_path), row.question) for row in tested.itertuples()}


def test_without_gradio_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"^gradio cannot be imported .*: pip install -r requirements-app\.txt$"):
        app.main(app.Config())


def test_a_port_in_use_is_named_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", object())
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=rf"^cannot listen on 127\.0\.0\.1:{port} .*: choose another --port or --host$"):
            app.main(app.Config(checkpoint="missing.pt", port=port))
