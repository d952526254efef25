"""How the tests run mini_vqa_v2.py: small official files, a few images, and the script in this process without long waits."""
import functools
import gzip
import hashlib
import json
import zipfile

import pytest
from conftest import ROOT, call_script, start
from image_server import draw_jpeg
from tiny import read_csv

import download.http

QUESTIONS = "v2_OpenEnded_mscoco_train2014_questions.json"
ANNOTATIONS = "v2_mscoco_train2014_annotations.json"
ZIPS = {QUESTIONS: "v2_Questions_Train_mscoco.zip", ANNOTATIONS: "v2_Annotations_Train_mscoco.zip"}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """Before a retry."""
    monkeypatch.setattr(download.http, "BACKOFF", 0.01)


def entry(question_id, image_id=None, answers=("a red kite",) * 10, question="What is it?", choice=None):
    """One question and its annotation, as the official files hold them."""
    image_id = question_id // 10 if image_id is None else image_id
    return ({"image_id": image_id, "question": question, "question_id": question_id},
            {"question_type": "what is", "multiple_choice_answer": choice or answers[0], "image_id": image_id,
             "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": i}
                         for i, answer in enumerate(answers, 1)],
             "answer_type": "other", "question_id": question_id})


def write_official(folder, entries, subset="train2014"):
    """Write entries in the official layout, as plain JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    questions, annotations = [list(column) for column in zip(*entries, strict=True)]
    names = [name.replace("train2014", subset) for name in (QUESTIONS, ANNOTATIONS)]
    (folder / names[0]).write_text(json.dumps({"data_subtype": subset, "questions": questions}), encoding="utf-8")
    (folder / names[1]).write_text(json.dumps({"data_subtype": subset, "annotations": annotations}), encoding="utf-8")
    return folder


def many_entries(num_images=120, per_image=2):
    """Enough images that no split is empty; all rows are kept by default."""
    return [entry(10 * image + i, answers=(f"kite number {image}",) * 10, question=f"Which kite, {i}?")
            for image in range(num_images) for i in range(per_image)]


@pytest.fixture
def run(tmp_path):
    """run(*flags) -> what mini_vqa_v2.py prints in this process; expect=2: its error line. Output to tmp_path / "out"."""
    return functools.partial(call_script, "mini_vqa_v2.py", "--output-dir", tmp_path / "out", "--workers", 4, cwd=tmp_path)


def start_script(*flags):
    """mini_vqa_v2.py in a process of its own, as a Popen."""
    return start(ROOT / "mini_vqa_v2.py", *flags, cwd=ROOT)


def read_rows(folder):
    return read_csv(folder / "metadata.csv")


def repack(folder, target, kind):
    """The official files of `folder` in another form: "json", "gz", "zip" or "bom"."""
    target.mkdir()
    for name in (QUESTIONS, ANNOTATIONS):
        content = (folder / name).read_bytes()
        if kind == "gz":
            (target / f"{name}.gz").write_bytes(gzip.compress(content))
        elif kind == "zip":
            with zipfile.ZipFile(target / ZIPS[name], "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(name, content)
        else:
            (target / name).write_bytes({"json": b"", "bom": b"\xef\xbb\xbf"}[kind] + content)
    return target


def serve_zips(folder):
    """{path: bytes} of the two zips of an official folder under /vqa."""
    packed = repack(folder, folder.parent / "packed", "zip")
    return {f"/vqa/{path.name}": path.read_bytes() for path in packed.iterdir()}


NAMES = [f"COCO_train2014_{image:012d}.jpg" for image in range(120)]
ODD = NAMES[60]


@pytest.fixture
def collect_from(run, tmp_path):
    """collect_from(url, *flags) -> as `run`, with one question for each image of NAMES."""
    return functools.partial(run, "--vqa-dir", write_official(tmp_path / "vqa", many_entries(per_image=1)), "--image-url")


def read_missing(folder):
    return {row["name"]: row["reason"] for row in read_csv(folder / "missing.csv")}


def assert_complete(folder):
    """All images of NAMES, byte by byte, nothing else, and a manifest that lists them."""
    found = {path.name: path.read_bytes() for path in (folder / "images").iterdir()}
    assert found == {name: draw_jpeg(name) for name in NAMES}
    assert sorted(path.name for path in folder.iterdir()) == ["held_out_annotators.json", "images", "manifest.csv",
                                                              "metadata.csv", "qa_pairs.json"]
    lines = [f"{name},{len(body)},{hashlib.sha256(body).hexdigest()},ok\n" for name, body in sorted(found.items())]
    assert (folder / "manifest.csv").read_text() == "".join(["name,bytes,sha256,status\n", *lines])
