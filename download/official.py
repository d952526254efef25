"""Text files in VQA's layout: the official ones of VQA v2, and others that the user names.

Official files are found in a folder, or downloaded into it and verified by sha256. Files beyond the limits below are refused.
"""
import gzip
import json
import lzma
import re
import zipfile
import zlib
from pathlib import Path

import pooch
from tqdm import tqdm

from common.files import is_text
from common.settings import printable
from download.http import download_body, open_session

JSON_NAMES = {"questions": "v2_OpenEnded_mscoco_{}_questions.json", "annotations": "v2_mscoco_{}_annotations.json"}
ZIP_NAMES = {"questions": "v2_Questions_{}_mscoco.zip", "annotations": "v2_Annotations_{}_mscoco.zip"}
UNLABELLED = ("test2015", "test-dev2015")  # subsets whose annotations are not published
# the subset as the zips spell it; both test subsets are in one zip
SUBSET_NAMES = {"train2014": "Train", "val2014": "Val", "test2015": "Test", "test-dev2015": "Test"}
SHA256 = {
    "v2_Questions_Train_mscoco.zip": "05a64b6e2582d06d7585f5429674a9a33851878be1bff9f8668cdcf792df611e",
    "v2_Annotations_Train_mscoco.zip": "fb101bcefe91422c543c2bb6d70af11eb3119d0ff745ae283d09acdf66250853",
    "v2_Questions_Val_mscoco.zip": "e71f6c5c3e97a51d050f28243e262b28cd0c48d11a6b4632d769d30d3f93222a",
    "v2_Annotations_Val_mscoco.zip": "0caae7c8d1dafd852727f5ac046bc1efca9b72026bd6ffa34fc489f3a7b3291e",
    "v2_Questions_Test_mscoco.zip": "982e2e687a86514b78ea83af356d151976c5e3fb4168a29ca543610574082ad7",
}
MAX_ZIP_BYTES = 1 << 28  # the largest official zip has 22 MB
MAX_ZIP_SECONDS = 3600  # for one zip, all tries together
MAX_JSON_BYTES = 1 << 30  # the largest official text has 356 MB
NUM_NAMED = 3  # files of other names that a message names
NO_VQA_LAYOUT = ("check the files in --vqa-dir, or --questions and --annotations; data in another layout, as of VizWiz or GQA, "
                 "can be given as a CSV: see 'Your own data' in docs/data.md")
# a path below a folder or an address; the image id once, in the file name, with at most two digits of width
PATTERN = re.compile(r"(?:[^{}\\,:\s\x00]+/)?[^{}\\,:\s\x00/]*\{image_id(?::0\d\d?d)?\}[^{}\\,:\s\x00/]*")
DAMAGED = (ValueError, OSError, EOFError, KeyError, RuntimeError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)


def check_own_files(own):
    """Raise ValueError or FileNotFoundError unless {flag: value} of --questions, --annotations, --image-pattern can be used.

    The pattern, formatted with an image_id, is then a path of its own for each image.
    """
    if missing := [flag for flag, value in own.items() if value is None]:
        raise ValueError(f"{', '.join(own)} go together: {' and '.join(missing)} is missing")
    for flag in ("--questions", "--annotations"):
        if not (Path(own[flag]).is_file() and own[flag].endswith((".json", ".json.gz"))):
            raise FileNotFoundError(f"{flag} {own[flag]} is no .json or .json.gz file that exists (unpack a .zip)")
    pattern = own["--image-pattern"]
    if not PATTERN.fullmatch(pattern) or not is_text(pattern) or {"", ".", ".."} & set(pattern.split("/")):
        raise ValueError(f"--image-pattern '{pattern}' is no path like val2014/COCO_val2014_{{image_id:012d}}.jpg: the file "
                         "name must hold {image_id} once, or {image_id:012d} for 12 digits; no spaces, commas, colons or ..")


def read_official(vqa_dir, subset, base_url):
    """(questions, annotations) of a subset of VQA v2, each {question_id: entry}. annotations is None if they are not published.

    Missing files are downloaded. Raises ValueError as `find_official` and `read_entries`.
    """
    kinds = ("questions",) if subset in UNLABELLED else ("questions", "annotations")
    entries = {kind: read_entries(*find_official(vqa_dir, subset, kind, base_url), kind) for kind in kinds}
    return entries["questions"], entries.get("annotations")


def find_official(vqa_dir, subset, kind, base_url):
    """(path, json_name) of the official file of `kind`, "questions" or "annotations": found in `vqa_dir`, else downloaded.

    The path ends in .json, .json.gz or .zip; `json_name` is the member of the zip. Raises ValueError if the file is not
    there and cannot be downloaded, or if the folder holds JSON files of another data set only. A zip with another sha256
    than the published one is not kept.
    """
    folder, name, zip_name = Path(vqa_dir), JSON_NAMES[kind].format(subset), ZIP_NAMES[kind].format(SUBSET_NAMES[subset])
    for found in (name, f"{name}.gz", zip_name):
        if (folder / found).is_file():
            return folder / found, name
    refuse_other_files(folder)
    url = f"{base_url.rstrip('/')}/{zip_name}"
    print(printable(f"downloading {url}"), flush=True)
    pooch.get_logger().setLevel("ERROR")
    try:
        pooch.retrieve(url, SHA256[zip_name], zip_name, folder, downloader=download_zip)
    except ValueError as error:
        raise ValueError(f"--vqa-dir {folder} holds no {name}, {name}.gz or {zip_name}, and downloading {url} failed "
                         f"({error}): run again, put one of the files there, or name a mirror with --base-url") from error
    except OSError as error:  # a full disk: writing names no file
        error.filename = error.filename or str(folder / zip_name)
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted while downloading {zip_name}: run again to continue") from None
    return folder / zip_name, name


def refuse_other_files(folder):
    """Raise ValueError if `folder` holds JSON files and none of them is VQA v2's: a download would bring another data set."""
    jsons = [template.format(subset) for template in JSON_NAMES.values() for subset in SUBSET_NAMES]
    official = {*SHA256, *jsons, *(f"{name}.gz" for name in jsons)}
    others = sorted(path.name for path in folder.glob("*.json*"))
    if others and not any((folder / name).exists() for name in official):
        names = ", ".join(others[:NUM_NAMED]) + ", ..." * (len(others) > NUM_NAMED)
        raise ValueError(f"--vqa-dir {folder} holds {names} and none of VQA v2's text files: name your files with --questions "
                         "FILE --annotations FILE, or another folder to download VQA v2 into it")


def download_zip(url, output_file, _):
    """The downloader that pooch calls; pooch then compares the sha256 and renames the file."""
    with open_session(1) as session, tqdm(desc="downloading", unit="B", unit_scale=True) as bar:
        body = download_body(session, url, MAX_ZIP_BYTES, MAX_ZIP_SECONDS, check_zip, bar)
    Path(output_file).write_bytes(body)


def check_zip(body):
    """Raise ValueError if the first bytes are not a zip's, as of a log-in page that was sent with status 200."""
    if not body.startswith(b"PK\x03\x04"):
        raise ValueError(f"not a zip: it begins with {body[:20]!r}")


def read_json(path, name, object_hook=None):
    """Parse a .json file, a .json.gz file, or the member `name` of a .zip file, without unpacking it onto the disk.

    Raises ValueError that names `path` if it is damaged or unpacks to more than MAX_JSON_BYTES. `name` is None for a file of
    the user's own.
    """
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive, archive.open(name) as stream:
                content = stream.read(MAX_JSON_BYTES + 1)
        else:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as stream:
                content = stream.read(MAX_JSON_BYTES + 1)
        if len(content) > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES:,} bytes of text")
        content = str(content, "utf-8-sig")  # frees the bytes before the objects are built
        return json.loads(content, object_hook=object_hook)
    except DAMAGED as error:
        remedy = "replace it by a whole one" if name is None else "delete it and run again"
        raise ValueError(f"{path} is not a whole JSON file ({error}): {remedy}") from error


def read_entries(path, name, kind):
    """{question_id: entry} of a file in VQA's layout; `kind`: its list at the top level, "questions" or "annotations".

    path, name: as for `read_json`. Each answer is its text. Raises ValueError if the file has another layout.
    """
    print(printable(f"reading {path}"), flush=True)
    # keep only the answer text of each object; this saves 1 GB
    content = read_json(path, name, lambda item: item["answer"] if "answer" in item and "question_id" not in item else item)
    if not isinstance(content, dict) or not isinstance(content.get(kind), list):
        raise ValueError(f"{path} has no list '{kind}' at its top level: {NO_VQA_LAYOUT}")
    entries = {}
    for position, entry in enumerate(content[kind]):
        question_id, _ = (field(entry, name, int, f"{path}, entry {position}") for name in ("question_id", "image_id"))
        if question_id in entries:
            raise ValueError(f"{path}: question id {question_id} occurs twice; replace it by the official file")
        entries[question_id] = entry
    return entries


def field(entry, name, kind, where, default=None):
    """entry[name], of type `kind` (int >= 0, or str that a UTF-8 CSV can hold). Raises ValueError that begins with `where`."""
    value = entry.get(name, default) if isinstance(entry, dict) else None
    if type(value) is not kind or (kind is int and value < 0):
        raise ValueError(f"{where}: {name} is {value!r:.60}, not {'a text' if kind is str else 'a number'}; {NO_VQA_LAYOUT}")
    if kind is str and ("\0" in value or not is_text(value)):
        raise ValueError(f"{where}: {value!a:.60} holds a NUL or an unpaired surrogate; {NO_VQA_LAYOUT}")
    return value
