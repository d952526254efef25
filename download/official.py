"""The official VQA v2 text files: found in a folder or downloaded into it, verified by sha256, read within limits."""
import gzip
import json
import lzma
import zipfile
import zlib
from pathlib import Path

import pooch
from tqdm import tqdm

from common.settings import printable
from download.http import download_body, open_session

JSON_NAMES = {"questions": "v2_OpenEnded_mscoco_{}_questions.json", "annotations": "v2_mscoco_{}_annotations.json"}
ZIP_NAMES = {"questions": "v2_Questions_{}_mscoco.zip", "annotations": "v2_Annotations_{}_mscoco.zip"}
SUBSET_NAMES = {"train2014": "Train", "val2014": "Val"}  # the subset as the zips spell it
SHA256 = {
    "v2_Questions_Train_mscoco.zip": "05a64b6e2582d06d7585f5429674a9a33851878be1bff9f8668cdcf792df611e",
    "v2_Annotations_Train_mscoco.zip": "fb101bcefe91422c543c2bb6d70af11eb3119d0ff745ae283d09acdf66250853",
    "v2_Questions_Val_mscoco.zip": "e71f6c5c3e97a51d050f28243e262b28cd0c48d11a6b4632d769d30d3f93222a",
    "v2_Annotations_Val_mscoco.zip": "0caae7c8d1dafd852727f5ac046bc1efca9b72026bd6ffa34fc489f3a7b3291e",
}
MAX_ZIP_BYTES = 1 << 28  # the largest official zip has 22 MB
MAX_ZIP_SECONDS = 3600  # for one zip, all tries together
MAX_JSON_BYTES = 1 << 30  # the largest official text has 356 MB
DAMAGED = (ValueError, OSError, EOFError, KeyError, RuntimeError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)


def find_official(vqa_dir, subset, kind, base_url):
    """(path, json_name) of the official file of `kind`, "questions" or "annotations": found in `vqa_dir`, else downloaded.

    The path ends in .json, .json.gz or .zip; `json_name` is the member of the zip. Raises ValueError if the file is not
    there and cannot be downloaded. A zip with another sha256 than the published one is not kept.
    """
    folder, name, zip_name = Path(vqa_dir), JSON_NAMES[kind].format(subset), ZIP_NAMES[kind].format(SUBSET_NAMES[subset])
    for found in (name, f"{name}.gz", zip_name):
        if (folder / found).is_file():
            return folder / found, name
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

    Raises ValueError that names `path` if it is damaged or unpacks to more than MAX_JSON_BYTES.
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
        raise ValueError(f"{path} is not a whole JSON file ({error}): delete it and run again") from error
