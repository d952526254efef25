"""The images of the kept rows: downloaded, or copied from a local folder. Only images that can be decoded are accepted.

Writes images/, manifest.csv (size and sha256 of each image, so that the next run need not decode it again) and, if
images are missing, missing.csv (name and reason).
"""
import csv
import hashlib
import io
import multiprocessing
import os
import re
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

from PIL import UnidentifiedImageError
from tqdm import tqdm

from common.files import atomic_write, remove_temporaries
from common.images import UNREADABLE, keep_memory, open_image
from download.http import Unavailable, download_body, open_session

MAX_IMAGE_BYTES = 1 << 25  # COCO's largest image has about 1 MB
MAX_SECONDS = 120  # for the body of one image, all tries together
MAX_IDLE_SECONDS = 600  # without any finished image: the remaining images are not tried
MAX_MISSING_SHARE = 0.01  # of the needed images; with more missing, the data set is not the one that was asked for
MAX_COPIES_SHARE = 0.01  # of the images; with more copies, the source serves a placeholder. One copy is always allowed
MAX_OUTAGES = 3  # images in a row for which the server was unavailable: the remaining images are not tried
NUM_NAMED = 5  # failed images that a message names
MANIFEST_HEADER = "name,bytes,sha256,status\n"
MANIFEST_LINE = re.compile(r"^([^,\n]+),(\d{1,15}),([0-9a-f]{64}),(?:ok|missing)$", re.MULTILINE)


def collect_images(source_of, output_dir, image_dir, image_url, workers, image_pattern=None):
    """Put images into output_dir/images: copies from `image_dir`, or downloads if that is None.

    `source_of`: {file name: path below `image_url` or `image_dir`}; a local image may also lie in `image_dir` itself.
    `image_pattern`: the user's own pattern of these paths, which a message names.
    Returns the set of missing names, and the copies: {name: first name with the same bytes}. missing.csv lists the missing
    names with reasons; their number and examples are printed. Raises ValueError if more than MAX_MISSING_SHARE are missing
    (a download stops as soon as that is certain), or if more than MAX_COPIES_SHARE are copies.
    """
    names, folder = sorted(source_of), output_dir / "images"
    folder.mkdir(exist_ok=True)
    remove_temporaries(folder)
    keep_memory()
    known = read_manifest(output_dir / "manifest.csv")
    max_missing = MAX_MISSING_SHARE * len(names)
    if image_dir is not None:
        copy = partial(copy_image, Path(image_dir), source_of, known, folder)
        complete, failed = run_in_threads("copying", names, copy, workers)
    else:
        present = [name for name in names if (folder / name).exists()]
        complete, _ = run_in_threads("checking", present, partial(check_file, known, folder), workers)
        needed = [name for name in names if name not in complete]
        download = partial(download_image, open_session(workers), image_url.rstrip("/"), source_of, folder)
        downloaded, failed = run_in_threads("downloading", needed, download, workers, max_missing)
        complete |= downloaded
    if hasattr(os, "sync"):  # not on Windows
        os.sync()  # the images are on the disk before metadata.csv names them
    missing = {name: failed.get(name, "not tried") for name in names if name not in complete}
    write_manifest(output_dir / "manifest.csv", known | complete, missing)
    write_missing(output_dir / "missing.csv", missing)
    source = f"--image-url {image_url}" if image_dir is None else f"--image-dir {image_dir}"
    source += f" and --image-pattern {image_pattern}" * (image_pattern is not None)
    if missing:
        examples = ", ".join(f"{name} {reason}" for name, reason in sorted(failed.items())[:NUM_NAMED])
        message = (f"{len(missing)} of {len(names)} images are missing, for example {examples}; "
                   f"the whole list is in {output_dir / 'missing.csv'}")
        if len(missing) > max_missing:
            raise ValueError(f"{message}; at most {MAX_MISSING_SHARE:.0%} may be missing: check {source}"
                             + " and run again: the downloaded images are kept" * (image_dir is None))
        print(message)
    return set(missing), find_copies(complete, source, folder)


def find_copies(found, source, folder):
    """{name: first name with the same bytes}, by name. `found`: {name: (bytes, sha256)}.

    Raises ValueError that names `source` and `folder` if more than MAX_COPIES_SHARE are copies.
    """
    first = {}
    copies = {name: first[found[name]] for name in sorted(found) if first.setdefault(found[name], name) != name}
    if len(copies) > max(1, MAX_COPIES_SHARE * len(found)):
        name, original = next(iter(copies.items()))
        raise ValueError(f"{len(copies)} of {len(found)} images are copies of another one, for example {name} of {original}; "
                         f"at most {MAX_COPIES_SHARE:.0%} may be: check that {source} serves no placeholder, delete {folder} "
                         "and run again")
    return copies


def run_in_threads(action, names, function, workers, max_failed=None):
    """Call `function(name)` in threads with a progress bar; returns ({name: result}, {name: reason of its ValueError}).

    A result begins with the size in bytes. With `max_failed`, no further image is tried once more have failed, or once
    the server was unavailable MAX_OUTAGES times in a row. Without any result for MAX_IDLE_SECONDS, all remaining ones fail.
    """
    def call(name):
        try:
            return name, function(name)
        except ValueError as error:
            return name, error

    if not names:
        return {}, {}
    done, failed, num_bytes, num_outages = {}, {}, 0, 0
    # The threads are daemons and are not joined: Ctrl-C does not wait for a request or for a pause before a retry.
    with ThreadPool(workers) as pool, tqdm(desc=f"{action} images", total=len(names), unit=" images") as bar:
        results = pool.imap_unordered(call, names)
        try:
            for _ in names:
                name, result = results.next(MAX_IDLE_SECONDS)
                num_outages = num_outages + 1 if isinstance(result, Unavailable) else 0
                if isinstance(result, ValueError):
                    failed[name] = str(result)
                else:
                    done[name] = result
                    num_bytes += result[0]
                if max_failed is not None and (len(failed) > max_failed or num_outages == MAX_OUTAGES):
                    break
                bar.set_postfix_str(f"{num_bytes / 1e6 / max(bar.format_dict['elapsed'], 1e-3):.1f} MB/s", refresh=False)
                bar.update()
        except multiprocessing.TimeoutError:
            failed |= dict.fromkeys(set(names) - done.keys() - failed.keys(), f"no end after {MAX_IDLE_SECONDS} s")
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted after {action} {len(done)} of {len(names)} images: run again to "
                                    "continue") from None
    return done, failed


def check_file(known, folder, name):
    """(bytes, sha256) of the image file if it is the one in the manifest or, not being listed there, can be decoded."""
    body, found = read_file(folder / name)
    if name not in known:
        check_image(body)
    elif known[name] != found:
        raise ValueError("changed since the last run")
    return found


def download_image(session, image_url, source_of, folder, name):
    """Download one image; returns (bytes, sha256). Raises ValueError with the reason."""
    body = download_body(session, f"{image_url}/{source_of[name]}", MAX_IMAGE_BYTES, MAX_SECONDS, check_image)
    with atomic_write(folder / name, durable=False) as temporary:
        temporary.write_bytes(body)
    return len(body), hashlib.sha256(body).hexdigest()


def copy_image(image_dir, source_of, known, folder, name):
    """Copy one image of `image_dir` or its subfolders; returns (bytes, sha256). Raises ValueError.

    A hard link would save space, but whoever edits the copy would edit the original.
    """
    path, source = folder / name, image_dir / name
    if not source.exists():
        source = image_dir / source_of[name]
    body, found = read_file(source)
    if known.get(name) != found:
        check_image(body)
    if not (path.exists() and path.read_bytes() == body):
        with atomic_write(path, durable=False) as temporary:
            temporary.write_bytes(body)
    return found


def read_file(path):
    """The bytes of an image file, and (their number, sha256). Raises ValueError if it cannot be an image."""
    if not path.exists():
        raise ValueError("missing")
    if not path.is_file() or path.stat().st_size > MAX_IMAGE_BYTES:
        raise ValueError(f"not an image file of at most {MAX_IMAGE_BYTES:,} bytes")
    try:
        body = path.read_bytes()
    except OSError as error:
        raise ValueError(f"unreadable: {error.strerror}") from error
    return body, (len(body), hashlib.sha256(body).hexdigest())


def check_image(body):
    """Decode every pixel of an image given as bytes. Raises ValueError if that fails."""
    try:
        open_image(io.BytesIO(body))
    except UnidentifiedImageError:
        raise ValueError(f"not an image: {len(body):,} bytes that begin with {body[:20]!r}") from None
    except UNREADABLE as error:
        raise ValueError(f"unreadable: {error}") from error


def read_manifest(path):
    """{name: (bytes, sha256)} of the images of earlier runs; lines that cannot be read are ignored."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return {name: (int(size), digest) for name, size, digest in MANIFEST_LINE.findall(text)}


def write_manifest(path, known, missing):
    """One line per image, by name. A missing image keeps its size and sha256, so that a damaged file stays damaged."""
    lines = []
    for name in sorted(known | missing):
        size, digest = known.get(name, (0, ""))
        lines.append(f"{name},{size},{digest},{'missing' if name in missing else 'ok'}\n")
    with atomic_write(path) as temporary:
        temporary.write_text(MANIFEST_HEADER + "".join(lines), encoding="utf-8", newline="")


def write_missing(path, missing):
    """One line per missing image, by name; no file if none is missing."""
    if not missing:
        path.unlink(missing_ok=True)
        return
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("name", "reason"))
        writer.writerows(sorted(missing.items()))
