"""The gallery page: all answers with their images and scores, to search and filter. No torch.

`rows` are those of `results.result_rows`. The page is the template gallery.html beside this file, filled with data.
"""
import base64
import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from common.files import atomic_write
from evaluation.drawing import GRADES, count_answers, fitted, grade
from evaluation.report import score_bars, table_lines, verdict_sentence

THUMBNAIL_SIZE, THUMBNAIL_QUALITY, THUMBNAIL_THREADS = 640, 75, 4
TEMPLATE = Path(__file__).with_name("gallery.html")
PAGE_FIELDS = ("question_id", "image_path", "question", "answer", "prediction", "sentence_bleu", "vqa_accuracy",
               "confidence", "gate", "question_type", "answer_type")


def write_gallery(rows, metrics, results_dir):
    """Write index.html and thumbnails/*.jpg (one for each image_path) into `results_dir`.

    metrics: the content of the metrics file, or None without labels: then the page shows no scores. A row may have the key
    `explanation`: the name of a PNG in `results_dir` that shows why the model gave this answer.
    """
    results_dir = Path(results_dir)
    thumbnails = _write_thumbnails({row["image_path"]: row["image_file"] for row in rows}, results_dir / "thumbnails")
    page = {"scores": [], "table": [], "types": [], "novel": "", "interval": "", "verdict": "", "about": {}}
    if metrics is not None:
        types = {f"{kind} type: {name} (n = {table['n']:,})": table
                 for kind in ("answer", "question") for name, table in metrics[f"by_{kind}_type"].items()}
        types |= {f"label {name} in training (n = {table['n']:,})": table
                  for name, table in metrics.get("by_training_label", {}).items()}
        page = {"scores": score_bars(metrics), "verdict": verdict_sentence(metrics),
                "table": _values(metrics, table_lines(metrics)), "types": _values(metrics, types),
                "novel": _novel_sentence(metrics), "interval": metrics["interval"],
                "about": {name: metrics[name] for name in ("checkpoint", "split", "signature")}}
    grades = {name: (mark, word) for name, (mark, word, _) in GRADES.items()}
    page |= {"num_images": len(thumbnails), "grades": grades, "rows": [
        {name: row[name] for name in PAGE_FIELDS} | {name: row[name] for name in ("explanation",) if name in row}
        | {"thumbnail": f"thumbnails/{thumbnails[row['image_path']]}", "answers": count_answers(row), "grade": grade(row)}
        for row in rows]}
    template = TEMPLATE.read_text(encoding="utf-8")
    for tag in ("style", "script"):
        inline = re.search(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL).group(1)
        digest = base64.b64encode(hashlib.sha256(inline.encode("utf-8")).digest()).decode("ascii")
        template = template.replace(f"{tag.upper()}_SHA256", digest)
    with atomic_write(results_dir / "index.html") as temporary:
        temporary.write_text(template.replace("PAGE_DATA", embed_json(page)), encoding="utf-8", newline="\n")


def _values(metrics, lines):
    """{name: {NAME: {"value"}}} -> [[name, value, ...]], one value or None for each of the `score_bars`."""
    return [[line, *(table[bar["name"]]["value"] for bar in score_bars(metrics))] for line, table in lines.items()]


def _novel_sentence(metrics):
    """How many predictions are no training label, as a sentence; "" if the training labels are not known."""
    if "novel_predictions" not in metrics:
        return ""
    novel = metrics["novel_predictions"]
    interval = "" if None in novel["ci95"] else f" [{novel['ci95'][0]:.1f}, {novel['ci95'][1]:.1f}]"
    return f"{novel['value']:.1f} %{interval} of the {novel['n']:,} predictions are no training label."


def embed_json(value):
    """`value` as JSON that is safe inside an HTML script element: ASCII only, no `<`, `>` or `&`. NaN raises ValueError."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.translate({ord(character): f"\\u{ord(character):04x}" for character in "<>&"})


def _write_thumbnails(images, folder):
    """Write one JPEG for each entry of `images` (image_path -> file); returns image_path -> file name.

    The names are hashes, because an image_path may hold any character. Other thumbnails, of an earlier run, are deleted.
    """
    names = {image_path: hashlib.sha256(image_path.encode("utf-8", "surrogatepass")).hexdigest()[:16] + ".jpg"
             for image_path in images}

    def write(image_path):
        thumbnail = fitted(images[image_path], THUMBNAIL_SIZE, THUMBNAIL_SIZE, enlarge=False)
        with atomic_write(folder / names[image_path], durable=False) as temporary:
            thumbnail.save(temporary, quality=THUMBNAIL_QUALITY)

    with ThreadPoolExecutor(THUMBNAIL_THREADS) as threads:
        list(tqdm(threads.map(write, images), total=len(images), desc="thumbnails", unit="image"))
    for old in set(folder.glob("*.jpg")) - {folder / name for name in names.values()}:
        if re.fullmatch(r"[0-9a-f]{16}\.jpg", old.name):
            old.unlink()
    return names
