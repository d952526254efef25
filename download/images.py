"""The pictures that kept rows need, each decoded in full, put into images/: downloaded, or linked from a local folder.

Beside images/ lie manifest.csv, which makes the next run check instead of fetch, and missing.csv while any are missing.
"""
import csv
import hashlib
import io
import os
import shutil
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from common.files import atomic_write, remove_temporaries
from common.images import UNREADABLE, keep_memory, open_image
from download.http import ask, open_session, read_body
from download.manifest import Manifest
from download.throttle import Fault, Stopped, Throttle, persist

MAX_PICTURE_BYTES = 1 << 25  # COCO's largest has about 1 MB
MAX_PIXELS = 50_000_000  # COCO's pictures have 0.4 million; decoding takes 12 bytes for each, in every thread
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")  # Pillow's rarer decoders raise anything, and one runs PostScript
MAX_SECONDS = 300  # for one try to fetch one picture
MAX_LOST_SHARE = 0.01  # of the needed pictures; beyond it the dataset is not the one that was asked for
NUM_NAMED = 5  # lost pictures named in a message


def collect_pictures(names, output_dir, subset, image_dir, image_url, workers):
    """Put every picture of `names` into output_dir/images: from `image_dir`, or by download when that is None.

    Returns {name: reason} of the lost ones, prints the first and writes all to missing.csv. Raises ValueError when
    they are more than MAX_LOST_SHARE; a download stops as soon as that is certain.
    """
    folder = output_dir / "images"
    folder.mkdir(exist_ok=True)
    remove_temporaries(folder)
    keep_memory()
    throttle, lost, untried, max_lost = Throttle(workers), {}, [], MAX_LOST_SHARE * len(names)
    if image_dir is None:
        place = partial(download_picture, open_session(workers), throttle, f"{image_url.rstrip('/')}/{subset}")
    else:
        place = partial(link_picture, Path(image_dir), subset)

    def place_one(name):
        try:
            return place(manifest, folder / name)
        except ValueError as error:
            lost[name] = str(error)
            if image_dir is None and len(lost) > max_lost:
                throttle.stop()  # the run has failed: spare the server the rest
            return 0
        except Stopped:
            untried.append(name)
            return None

    with Manifest(output_dir / "manifest.csv") as manifest:
        for_all(names, place_one, workers, throttle)
        os.sync()  # the pictures are on the disk before a table names them, which costs less once than for each
        missing = lost | dict.fromkeys(untried, "not tried: the run had failed")
        write_missing(output_dir / "missing.csv", missing)
        manifest.rewrite(missing)
    if lost:
        message = f"{describe(lost, len(names), len(untried))}; all that are missing stand in {output_dir / 'missing.csv'}"
        if len(lost) > max_lost:
            remedy = (f"check --image-dir {image_dir}" if image_dir is not None else
                      "check --image-url and run again, on a slow line with fewer --workers: whole pictures are kept")
            raise ValueError(f"{message}; at most {MAX_LOST_SHARE:.0%} may be lost: {remedy}")
        print(message)
    return lost


def describe(lost, num_needed, num_untried):
    """How many pictures are lost, the first few with their reasons, and how many were not tried any more."""
    named = [f"{name} {reason}" for name, reason in sorted(lost.items())[:NUM_NAMED]]
    if len(lost) > NUM_NAMED:
        named.append("...")
    return f"{len(lost)} of {num_needed} pictures are lost ({', '.join(named)})" + (
        f" and {num_untried} were not tried any more" if num_untried else "")


def for_all(names, place_one, workers, throttle):
    """Run `place_one(name)` for all names in threads and show how far they are, by the bytes that it returns, or None.

    The first exception ends the others by throttle.stop(). An interruption is told how to go on.
    """
    pool, num_bytes, num_done = ThreadPoolExecutor(workers), 0, 0
    try:
        futures = [pool.submit(place_one, name) for name in names]
        with tqdm(desc="pictures", total=len(names), unit=" pictures") as bar:
            for future in as_completed(futures):
                if (size := future.result()) is None:
                    continue
                num_bytes, num_done = num_bytes + size, num_done + 1
                bar.set_postfix_str(f"{num_bytes / 1e6 / max(bar.format_dict['elapsed'], 1e-3):.1f} MB/s", refresh=False)
                bar.update()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted with {num_done} of {len(names)} pictures checked or fetched: run again "
                                "to go on") from None
    finally:
        throttle.stop()
        pool.shutdown(cancel_futures=True)


def download_picture(session, throttle, folder_url, manifest, path):
    """Fetch the picture named like `path` unless it is there and whole; returns its bytes. Raises ValueError."""
    if size := whole_size(manifest, path):
        return size

    def attempt():
        with throttle.turn(), ask(session, f"{folder_url}/{path.name}") as response:
            body = read_body(response, MAX_PICTURE_BYTES, MAX_SECONDS)
        try:
            check_picture(body)
        except ValueError as error:
            raise Fault(str(error)) from error
        return body

    body = persist(throttle, attempt)
    with atomic_write(path, durable=False) as temporary:
        temporary.write_bytes(body)
    manifest.record(path.name, len(body), hashlib.sha256(body).hexdigest())
    return len(body)


def whole_size(manifest, path):
    """Bytes of the picture at `path` if it is the one of the manifest, or, where that has none, can be decoded; else 0."""
    try:
        body = read_picture(path)
        digest = hashlib.sha256(body).hexdigest()
        if path.name in manifest.pictures:
            return len(body) if manifest.pictures[path.name] == (len(body), digest) else 0
        check_picture(body)
    except ValueError:
        return 0
    manifest.record(path.name, len(body), digest)
    return len(body)


def link_picture(image_dir, subset, manifest, path):
    """Hard-link or copy the picture named like `path`; returns its bytes. Raises ValueError that says why it cannot."""
    source = image_dir / path.name
    if not source.exists():
        source = image_dir / subset / path.name
    body = read_picture(source)
    known = len(body), hashlib.sha256(body).hexdigest()
    is_new = manifest.pictures.get(path.name) != known
    if is_new:
        check_picture(body)
    if not (path.exists() and (path.samefile(source) or path.read_bytes() == body)):
        with atomic_write(path, durable=False) as temporary:
            try:
                os.link(source.resolve(), temporary)
            except OSError:  # another file system, or one without hard links
                shutil.copyfile(source, temporary)
    if is_new:
        manifest.record(path.name, *known)
    return len(body)


def read_picture(path):
    """The bytes of a picture file. Raises ValueError that says what is wrong with it."""
    if not path.exists():
        raise ValueError("missing")
    if not path.is_file():
        raise ValueError("not a picture but a folder or device")
    if (size := path.stat().st_size) > MAX_PICTURE_BYTES:
        raise ValueError(f"not a picture: {size:,} bytes, more than {MAX_PICTURE_BYTES:,}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"unreadable: {error.strerror}") from error


def check_picture(body):
    """Decode every pixel of the picture whose file has these bytes. Raises ValueError that says what is wrong."""
    try:
        width, height = Image.open(io.BytesIO(body), formats=FORMATS).size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels, more than {MAX_PIXELS:,}")
        open_image(io.BytesIO(body))
    except UnidentifiedImageError:
        is_page = body.lstrip()[:1] == b"<"
        raise ValueError(f"not a picture but {'a page' if is_page else 'something else'} of {len(body):,} bytes") from None
    except UNREADABLE as error:
        raise ValueError(f"unreadable: {error}") from error


def write_missing(path, missing):
    """missing.csv: one line for each missing picture, by name; no file when there is none."""
    if not missing:
        path.unlink(missing_ok=True)
        return
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("name", "reason"))
        writer.writerows(sorted(missing.items()))
