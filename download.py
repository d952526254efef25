"""Files from elsewhere: the official VQA v2 text files and the COCO pictures, checked before they count.

All networking of mini_vqa_v2.py is here. Whatever arrives gets a temporary name, is checked there (sha256 for a zip,
a full decode for a picture), and only then takes its real name.
"""
import hashlib
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import requests
from PIL import UnidentifiedImageError
from requests.adapters import HTTPAdapter
from tqdm import tqdm

from files import whole_file
from pictures import UNREADABLE, open_picture

JSON_NAMES = {"questions": "v2_OpenEnded_mscoco_{}_questions.json", "annotations": "v2_mscoco_{}_annotations.json"}
ZIP_NAMES = {"questions": "v2_Questions_{}_mscoco.zip", "annotations": "v2_Annotations_{}_mscoco.zip"}
SIDES = {"train2014": "Train", "val2014": "Val"}  # the subset as the zips spell it
OFFICIAL_SHA256 = {
    "v2_Questions_Train_mscoco.zip": "05a64b6e2582d06d7585f5429674a9a33851878be1bff9f8668cdcf792df611e",
    "v2_Annotations_Train_mscoco.zip": "fb101bcefe91422c543c2bb6d70af11eb3119d0ff745ae283d09acdf66250853",
    "v2_Questions_Val_mscoco.zip": "e71f6c5c3e97a51d050f28243e262b28cd0c48d11a6b4632d769d30d3f93222a",
    "v2_Annotations_Val_mscoco.zip": "0caae7c8d1dafd852727f5ac046bc1efca9b72026bd6ffa34fc489f3a7b3291e",
}
TIMEOUTS = (10, 30)  # seconds to connect, and between two pieces of a body
WAITS = (0.5, 1, 2, 4, 8)  # seconds before each retry
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # statuses that another try may change
CHUNK = 1 << 16  # bytes
MAX_LOST_SHARE = 0.01  # of the needed pictures; beyond it the dataset is not the one that was asked for
NUM_NAMED = 5  # lost pictures named in a message


class Refused(ValueError):
    """The same request would meet the same answer, so trying again is pointless."""


def find_official(vqa_dir, subset, kind, base_url):
    """(path, json_name) of the official file of `kind`, "questions" or "annotations": found, else downloaded.

    The path ends in .json, .json.gz or .zip; `json_name` is the member of the zip. Raises ValueError when the file is
    neither there nor to be had, or when a downloaded zip has another sha256 than the published one (it is not kept).
    """
    folder, name, zip_name = Path(vqa_dir), JSON_NAMES[kind].format(subset), ZIP_NAMES[kind].format(SIDES[subset])
    for found in (name, f"{name}.gz", zip_name):
        if (folder / found).is_file():
            return folder / found, name
    try:
        with open_session(1) as session:
            fetch(session, f"{base_url.rstrip('/')}/{zip_name}", folder / zip_name,
                  partial(check_sha256, expected=OFFICIAL_SHA256[zip_name]), show_progress=True)
    except ValueError as error:
        raise ValueError(f"--vqa-dir {folder} holds no {name}, {name}.gz or {zip_name}, and downloading it failed "
                         f"({error}): put one there or name a mirror by --base-url") from error
    return folder / zip_name, name


def collect_pictures(names, folder, subset, image_dir, image_url, workers):
    """Put every picture of `names` into `folder`, decoded in full: from `image_dir`, or by download when that is None.

    Returns {name: reason} of the lost ones and prints the first. Raises ValueError when they are more than
    MAX_LOST_SHARE; a download stops as soon as that is certain.
    """
    if image_dir is None:
        remedy = "check --image-url and run again: whole pictures are kept"
        place = partial(download_picture, open_session(workers), f"{image_url.rstrip('/')}/{subset}")
    else:
        remedy = f"check --image-dir {image_dir}"
        place = partial(link_picture, Path(image_dir), subset)
    lost, max_lost = {}, MAX_LOST_SHARE * len(names)

    def place_one(name):
        if image_dir is None and len(lost) > max_lost:
            return  # the run has failed: spare the server the rest
        try:
            place(folder / name)
        except ValueError as error:
            lost[name] = str(error)

    pool = ThreadPoolExecutor(workers)
    try:
        for _ in tqdm(pool.map(place_one, names), "pictures", len(names), unit=" pictures"):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    if lost:
        named = ", ".join(f"{name} {reason}" for name, reason in sorted(lost.items())[:NUM_NAMED])
        message = f"{len(lost)} of {len(names)} pictures are lost ({named}{', ...' if len(lost) > NUM_NAMED else ''})"
        if len(lost) > max_lost:
            raise ValueError(f"{message}; at most {MAX_LOST_SHARE:.0%} may be: {remedy}")
        print(message)
    return lost


def link_picture(image_dir, subset, path):
    """Hard-link or copy the picture named like `path`. Raises ValueError that says what is wrong with it."""
    source = image_dir / path.name
    if not source.exists():
        source = image_dir / subset / path.name
    check_picture(source)
    with whole_file(path) as temporary:
        try:
            os.link(source.resolve(), temporary)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source, temporary)


def download_picture(session, folder_url, path):
    """Fetch the picture named like `path`, unless a whole one is there. Raises ValueError that says why it cannot."""
    try:
        check_picture(path)
    except ValueError:
        fetch(session, f"{folder_url}/{path.name}", path, check_picture)


def check_picture(path):
    """Decode every pixel of the picture at `path`. Raises ValueError that says what is wrong with it."""
    try:
        open_picture(path)
    except FileNotFoundError:
        raise ValueError("missing") from None
    except UnidentifiedImageError:
        raise ValueError("not a picture") from None
    except UNREADABLE as error:
        raise ValueError(f"unreadable: {error}") from error


def open_session(connections):
    """One pool of kept-alive connections for as many threads."""
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(pool_maxsize=connections))
    return session


def fetch(session, url, path, check, show_progress=False):
    """Fetch `url` to `path`, whole or not at all, trying again after each of WAITS.

    `check(temporary)` raises ValueError when the body is not what it should be. Raises ValueError with the last
    reason; an OSError of the disk passes through at once, since no retry mends it.
    """
    with whole_file(path) as temporary:
        for wait in (*WAITS, None):
            try:
                save_body(session, url, temporary, show_progress)
                return check(temporary)
            except (requests.RequestException, ValueError) as error:
                if wait is None or isinstance(error, Refused):
                    raise ValueError(f"{url}: {error}") from error
            time.sleep(wait)


def save_body(session, url, path, show_progress):
    """One request, its body written to `path`; a body shorter than announced is a RequestException."""
    with session.get(url, stream=True, timeout=TIMEOUTS) as response:
        if response.status_code in TRANSIENT:
            raise ValueError(f"status {response.status_code}")
        if response.status_code != requests.codes.ok:
            raise Refused(f"status {response.status_code}")
        name, size = url.rpartition("/")[2], int(response.headers.get("Content-Length", 0)) or None
        with (open(path, "wb") as stream,
              tqdm(desc=name, total=size, unit="B", unit_scale=True, disable=not show_progress) as bar):
            for chunk in response.iter_content(CHUNK):
                stream.write(chunk)
                bar.update(len(chunk))


def check_sha256(path, expected):
    """Raise Refused unless the file's sha256 is `expected` (hexadecimal)."""
    with open(path, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise Refused(f"its sha256 is {found}, the published one is {expected}")
