"""The official VQA v2 text files: found in a folder or fetched into it, checked, and read within bounds."""
import gzip
import hashlib
import itertools
import json
import os
import re
import zipfile
import zlib
from functools import partial
from pathlib import Path

from tqdm import tqdm

from common.files import file_lock
from download.http import CHUNK, announced_size, ask, open_session, read_pieces
from download.throttle import Fault, Refused, Throttle, persist

JSON_NAMES = {"questions": "v2_OpenEnded_mscoco_{}_questions.json", "annotations": "v2_mscoco_{}_annotations.json"}
ZIP_NAMES = {"questions": "v2_Questions_{}_mscoco.zip", "annotations": "v2_Annotations_{}_mscoco.zip"}
SIDES = {"train2014": "Train", "val2014": "Val"}  # the subset as the zips spell it
OFFICIAL_SHA256 = {
    "v2_Questions_Train_mscoco.zip": "05a64b6e2582d06d7585f5429674a9a33851878be1bff9f8668cdcf792df611e",
    "v2_Annotations_Train_mscoco.zip": "fb101bcefe91422c543c2bb6d70af11eb3119d0ff745ae283d09acdf66250853",
    "v2_Questions_Val_mscoco.zip": "e71f6c5c3e97a51d050f28243e262b28cd0c48d11a6b4632d769d30d3f93222a",
    "v2_Annotations_Val_mscoco.zip": "0caae7c8d1dafd852727f5ac046bc1efca9b72026bd6ffa34fc489f3a7b3291e",
}
MAX_ZIP_BYTES = 1 << 28  # the largest official zip has 22 MB
MAX_JSON_BYTES = 1 << 30  # the largest official text has 356 MB
TOO_LARGE = f"more than {MAX_JSON_BYTES:,} bytes of text"
ZIP_START = b"PK\x03\x04"


def find_official(vqa_dir, subset, kind, base_url):
    """(path, json_name) of the official file of `kind`, "questions" or "annotations": found, else downloaded.

    The path ends in .json, .json.gz or .zip; `json_name` is the member of the zip. Raises ValueError when the file is
    neither there nor to be had, or when a downloaded zip has another sha256 than the published one (it is not kept).
    """
    folder, name, zip_name = Path(vqa_dir), JSON_NAMES[kind].format(subset), ZIP_NAMES[kind].format(SIDES[subset])
    for found in (name, f"{name}.gz", zip_name):
        if (folder / found).is_file():
            return folder / found, name
    url = f"{base_url.rstrip('/')}/{zip_name}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        download_zip(url, folder / zip_name, OFFICIAL_SHA256[zip_name])
    except ValueError as error:
        raise ValueError(f"--vqa-dir {folder} holds no {name}, {name}.gz or {zip_name}, and downloading it failed "
                         f"({url}: {error}): run again to go on, put one there or name a mirror by --base-url") from error
    return folder / zip_name, name


def download_zip(url, path, expected):
    """Fetch the zip whose sha256 is `expected`, going on from what an earlier run left in `path`.part.

    The sum decides, not an ETag: pieces from two mirrors fit together, and pieces of two versions do not. Raises
    ValueError with the reason; what came is kept for the next run, unless its sum is wrong.
    """
    part = path.with_name(f"{path.name}.part")
    part.touch()
    with file_lock(part, "another run is fetching it"), open_session(1) as session:
        try:
            throttle = Throttle(1)
            attempt = partial(fetch_rest, session, url, part, expected, throttle)
            in_one_piece = persist(throttle, attempt, lambda: part.stat().st_size, CHUNK)
            if sha256(part) != expected and not in_one_piece:
                os.truncate(part, 0)
                persist(throttle, attempt, lambda: part.stat().st_size, CHUNK)
            if (found := sha256(part)) != expected:
                os.truncate(part, 0)
                raise Refused(f"its sha256 is {found}, the published one is {expected}")
            with open(part, "rb") as stream:
                os.fsync(stream.fileno())
            os.replace(part, path)
        finally:
            if part.exists() and part.stat().st_size == 0:
                part.unlink()


def fetch_rest(session, url, part, expected, throttle):
    """One request for what `part` lacks, appended to it; True if it is now whole, and was all fetched by this request.

    A server that ignores or misunderstands the range starts the file anew.
    """
    offset = part.stat().st_size
    if offset and sha256(part) == expected:
        return False  # killed between the last byte and the new name
    headers = {"Range": f"bytes={offset}-"} if offset else None
    with throttle.turn(), ask(session, url, (200, 206, 416), headers) as response:
        if response.status_code != 200 and first_byte(response) != offset:
            os.truncate(part, 0)
            raise Fault(f"status {response.status_code} to a request from byte {offset} on")
        if response.status_code == 200:
            offset = 0
        pieces = read_pieces(response, MAX_ZIP_BYTES - offset)
        first = next(pieces, b"")
        if offset == 0 and not first.startswith(ZIP_START):  # before the piece that is there is given up for it
            raise Fault(f"it is no zip but begins with {first[:20]!r}")
        total = (announced_size(response) or 0) + offset or None
        with (open(part, "ab" if offset else "wb") as stream,
              tqdm(desc=url.rpartition("/")[2], total=total, initial=offset, unit="B", unit_scale=True) as bar):
            for piece in itertools.chain([first], pieces):
                stream.write(piece)
                bar.update(len(piece))
    return offset == 0


def first_byte(response):
    """The position at which the body of a 206 answer begins; None where its Content-Range does not say."""
    match = re.match(r"bytes (\d{1,15})-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match and response.status_code == 206 else None


def sha256(path):
    """The file's sha256, hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(path, name, object_hook=None):
    """Parse a .json, a .json.gz, or the member `name` of a .zip.

    Nothing is unpacked onto the disk and no other member is looked at. Raises ValueError that names `path` where it is
    damaged or has more than MAX_JSON_BYTES once unpacked.
    """
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                member = archive.getinfo(name)
                if member.file_size > MAX_JSON_BYTES:
                    raise ValueError(TOO_LARGE)
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError(f"{name} is packed by method {member.compress_type}")
                with archive.open(member) as stream:
                    text = read_text(stream)
        else:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as stream:
                text = read_text(stream)
        return json.loads(text, object_hook=object_hook)
    except (ValueError, EOFError, KeyError, RuntimeError, zlib.error, zipfile.BadZipFile, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a whole JSON file ({error}): delete it and run again") from error


def read_text(stream):
    """All of a UTF-8 text of at most MAX_JSON_BYTES, which is found out by reading: headers may lie."""
    content = bytearray()
    while piece := stream.read(1 << 20):
        content += piece
        if len(content) > MAX_JSON_BYTES:
            raise ValueError(TOO_LARGE)
    return str(content, "utf-8-sig")
