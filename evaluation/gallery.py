"""Answered questions to look at: one picture per sample, the contact sheet, and the gallery page.

Reads the pictures that `rows` name and the page's template gallery.html beside this file. Writes PNGs
(draw_prediction, draw_overview) and results_dir/index.html with results_dir/thumbnails/*.jpg
(write_gallery), which prints a progress bar and takes about a second per 150 small photos.
No torch.

rows: list of dicts, one per question, with question_id, image_id, image_path (as in the CSV),
picture_file (Path), question, answer (label, "" if none), answers (all human answers, may be empty),
prediction, sentence_bleu, exact_match, vqa_accuracy (0 to 100, None without references), confidence
(0 to 1), gate (mean share of the picture against the question, 0 to 1, or None), question_type, answer_type.
"""
import base64
import functools
import hashlib
import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from common.files import atomic_write
from common.images import UNREADABLE, open_image
from evaluation.charts import ACCENT, BAND, HAIRLINE, INK, MUTED, PARTLY, RIGHT, WRONG, score_bars, verdict_sentence

# Of three words, one in common with the label scores 27.5 and two score 34.7 or more (sacrebleu, exponential
# smoothing, by which almost every wrong answer scores more than 0).
PARTLY_BLEU = 30.0
GRADES = {"right": ("✓", "right", RIGHT), "partly": ("≈", "partly right", PARTLY), "wrong": ("✗", "wrong", WRONG)}
PAPER, MAT = "#ffffff", "#f0f0ec"
PICTURE_WIDTH, PHOTO_HEIGHT, MARGIN = 960, 736, 44  # a 4:3 photo fills the width
CELL_WIDTH, CELL_GAP = 420, 28
MAX_ANSWERS_SHOWN, MAX_TEXT = 6, 600
THUMBNAIL_SIZE, THUMBNAIL_THREADS = 320, 4
TEMPLATE = Path(__file__).with_name("gallery.html")


def grade(row):
    """"right": the label itself; "partly": a human gave it, or sentence BLEU >= PARTLY_BLEU; else "wrong".

    None where the row has no reference to compare with.
    """
    if row["exact_match"] is None:
        return None
    if row["exact_match"] >= 100:
        return "right"
    return "partly" if (row["vqa_accuracy"] or 0) > 0 or (row["sentence_bleu"] or 0) >= PARTLY_BLEU else "wrong"


def count_answers(row):
    """The human answers with their counts, most frequent first, then in annotation order: list of (text, n)."""
    return Counter(row["answers"] or ([row["answer"]] if row["answer"] else [])).most_common()


def draw_prediction(row, path):
    """Write one answered question as a PNG: the picture; below it question, human answers, prediction, confidence."""
    photo = _fitted(row["picture_file"], PICTURE_WIDTH, PHOTO_HEIGHT)
    # drawn on more paper than any text needs, then cut to what was used
    image = Image.new("RGB", (PICTURE_WIDTH, photo.height + 1400), PAPER)
    image.paste(MAT, (0, 0, PICTURE_WIDTH, photo.height))
    image.paste(photo, ((PICTURE_WIDTH - photo.width) // 2, 0))
    draw = ImageDraw.Draw(image)
    inner = PICTURE_WIDTH - 2 * MARGIN
    y = _write(draw, MARGIN, photo.height + 34, row["question"], _font(34, True), INK, inner, 4) + 22
    draw.line((MARGIN, y, PICTURE_WIDTH - MARGIN, y), fill=HAIRLINE, width=2)
    middle = MARGIN + int(inner * 0.54)
    left = _draw_model(draw, row, MARGIN, y + 24, middle - MARGIN - 40)
    right = _draw_humans(draw, row, middle, y + 24, PICTURE_WIDTH - MARGIN - middle)
    with atomic_write(path) as temporary:
        image.crop((0, 0, PICTURE_WIDTH, max(left, right) + 36)).save(temporary)


def _draw_model(draw, row, x, y, width):
    """The left column: prediction, mark and word, confidence as number and bar. Returns where it ends."""
    mark, word, colour = GRADES.get(grade(row), ("", "", INK))
    y = _write(draw, x, y, "Model", _font(19), MUTED, width, 1) + 6
    y = _write(draw, x, y, row["prediction"] or "(no words)", _font(36, True), colour, width, 4) + 4
    if mark:
        y = _write(draw, x, y, f"{mark} {word}", _font(24, True), colour, width, 1) + 4
    y += 18
    _draw_bar(draw, (x, y + 10, x + width - 210, y + 19), row["confidence"], ACCENT)
    return _write(draw, x + width - 192, y - 1, f"confidence {row['confidence']:.2f}", _font(22), INK, 200, 1)


def _draw_humans(draw, row, x, y, width):
    """The right column: the human answers, most frequent first, each with its share as a bar behind its count."""
    answers = count_answers(row)
    num_humans = sum(n for _, n in answers)
    title = f"{num_humans} humans" if num_humans > 1 else "One human" if num_humans else "No human answers"
    y = _write(draw, x, y, title, _font(19), MUTED, width, 1) + 10
    for text, n in answers[:MAX_ANSWERS_SHOWN]:
        bold = text == row["answer"] and num_humans > 1
        if num_humans > 1:
            draw.text((x + 34, y), str(n), font=_font(24, bold), fill=INK, anchor="ra")
        indent = 50 if num_humans > 1 else 0
        end = _write(draw, x + indent, y, text, _font(24, bold), INK, width - indent, 2)
        if num_humans > 1:
            _draw_bar(draw, (x + indent, end + 1, x + width, end + 3), n / num_humans, INK if bold else MUTED)
        y = end + 15
    if len(answers) > MAX_ANSWERS_SHOWN:
        y = _write(draw, x, y, f"and {len(answers) - MAX_ANSWERS_SHOWN} other answers", _font(19), MUTED, width, 1)
    return y


def draw_overview(rows, path, columns=4):
    """Write the contact sheet of `rows`: picture, question, prediction and label of each, `columns` across."""
    if not rows:
        raise ValueError("0 rows: nothing to draw; choose --num-pictures of at least 1")
    cells = [_draw_cell(row) for row in rows]
    columns = min(columns, len(cells))
    lines = [cells[start:start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in line) for line in lines]
    size = (columns * (CELL_WIDTH + CELL_GAP) + CELL_GAP, sum(heights) + CELL_GAP * (len(lines) + 1))
    sheet = Image.new("RGB", size, PAPER)
    y = CELL_GAP
    for line, height in zip(lines, heights, strict=True):
        for column, cell in enumerate(line):
            sheet.paste(cell, (CELL_GAP + column * (CELL_WIDTH + CELL_GAP), y))
        y += height + CELL_GAP
    with atomic_write(path) as temporary:
        sheet.save(temporary)


def _draw_cell(row):
    """One cell of the contact sheet, as high as its words need."""
    box = CELL_WIDTH * 3 // 4
    photo = _fitted(row["picture_file"], CELL_WIDTH, box)
    cell = Image.new("RGB", (CELL_WIDTH, box + 420), PAPER)
    cell.paste(MAT, (0, 0, CELL_WIDTH, box))
    cell.paste(photo, ((CELL_WIDTH - photo.width) // 2, (box - photo.height) // 2))
    draw = ImageDraw.Draw(cell)
    mark, word, colour = GRADES.get(grade(row), ("", "", INK))
    y = _write(draw, 0, box + 14, row["question"], _font(22), INK, CELL_WIDTH, 3) + 6
    prediction = f"{mark} {row['prediction'] or '(no words)'}".strip()
    y = _write(draw, 0, y, prediction, _font(24, True), colour, CELL_WIDTH, 2)
    notes = [f"confidence {row['confidence']:.2f}"]
    if word != "right" and row["answer"]:
        y = _write(draw, 0, y, f"human: {row['answer']}", _font(20), INK, CELL_WIDTH, 2)
    y = _write(draw, 0, y + 2, "  ·  ".join([word] * bool(word) + notes), _font(18), MUTED, CELL_WIDTH, 1)
    return cell.crop((0, 0, CELL_WIDTH, y + 8))


def _fitted(path, width, height):
    """The picture scaled, up or down, to fill the width or the height; a sliver keeps at least one pixel.

    Raises OSError, naming the file, where it cannot be decoded.
    """
    try:
        picture = open_image(path)
    except UNREADABLE as error:
        raise OSError(f"{path} cannot be read as a picture ({error}); mend it or leave its rows out") from error
    scale = min(width / picture.width, height / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


@functools.lru_cache
def _font(size, bold=False):
    """DejaVu Sans, which comes with matplotlib: the same letters on every machine, no CJK and few emoji."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def _write(draw, x, y, text, font, fill, width, max_lines):
    """Write `text` wrapped to `width` pixels and at most `max_lines`; returns the y below it."""
    for line in wrap(text, font, width, max_lines):
        draw.text((x, y), line, font=font, fill=fill)
        y += round(font.size * 1.32)
    return y


def wrap(text, font, width, max_lines):
    """Lines of `text` no wider than `width` pixels: broken between words, within a word only where it alone is wider.

    What goes beyond `max_lines` is cut and marked by an ellipsis. Control characters count as spaces.
    """
    text = re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", " ", text[:MAX_TEXT])
    lines, line = [], ""
    for word in text.split():
        while word:
            longer = f"{line} {word}".strip()
            if font.getlength(longer) <= width:
                line, word = longer, ""
            elif line:
                lines.append(line)
                line = ""
            else:
                cut = next((n for n in range(len(word) - 1, 1, -1) if font.getlength(word[:n]) <= width), 1)
                lines.append(word[:cut])
                word = word[cut:]
    lines += [line] if line else []
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[:max_lines - 1], last + "…"]
    return lines


def _draw_bar(draw, box, share, colour):
    """A bar filled to `share` (0 to 1) of its box (left, top, right, bottom)."""
    left, top, right, bottom = box
    draw.rectangle(box, fill=BAND)
    filled = round((right - left) * min(1.0, max(0.0, share)))
    if filled:
        draw.rectangle((left, top, left + filled, bottom), fill=colour)


def write_gallery(rows, metrics, results_dir):
    """Write results_dir/index.html and results_dir/thumbnails/*.jpg (320 pixels, one per distinct image_path).

    metrics: the dict of vqa_test_metrics.json, its "verdict" (a string) where it has one; None where
    there is nothing to score against: the page then has no scores, no score filters and no score sorting.
    """
    results_dir = Path(results_dir)
    thumbnails = _write_thumbnails({row["image_path"]: row["picture_file"] for row in rows}, results_dir / "thumbnails")
    page = {
        "rows": [_page_row(row, thumbnails[row["image_path"]]) for row in rows],
        "scores": score_bars(metrics) if metrics else [],
        "types": _type_table(metrics) if metrics else [],
        "verdict": verdict_sentence(metrics) if metrics else "",
        "about": {name: (metrics or {}).get(name) for name in ("checkpoint", "split", "signature")},
        "num_images": len(thumbnails),
        "partly_bleu": PARTLY_BLEU,
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    for tag in ("style", "script"):
        inline = re.search(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL).group(1)
        digest = base64.b64encode(hashlib.sha256(inline.encode("utf-8")).digest()).decode("ascii")
        template = template.replace(f"{tag.upper()}_SHA256", digest)
    with atomic_write(results_dir / "index.html") as temporary:
        temporary.write_text(template.replace("PAGE_DATA", embed_json(page)), encoding="utf-8", newline="\n")


def _page_row(row, thumbnail):
    """What the page shows of one row."""
    kept = ("question_id", "image_path", "question", "answer", "prediction", "sentence_bleu", "vqa_accuracy",
            "confidence", "gate", "question_type", "answer_type")
    return {name: row[name] for name in kept} | {
        "thumbnail": f"thumbnails/{thumbnail}", "answers": count_answers(row), "grade": grade(row)}


def _type_table(metrics):
    """Scores per answer type and question type for the page: dicts with name, n and values (None where unknown)."""
    names = [bar["name"] for bar in score_bars(metrics)]
    return [{"name": f"{kind}: {name}", "n": table["n"],
             "values": [(table.get(score) or {}).get("value") for score in names]}
            for kind in ("answer type", "question type")
            for name, table in metrics.get(f"by_{kind.replace(' ', '_')}", {}).items()]


def embed_json(value):
    """`value` as JSON that is safe inside an HTML script element: ASCII only, no `<`, `>` or `&`. NaN is refused."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _write_thumbnails(pictures, folder):
    """Write one JPEG for each entry of `pictures` (image_path -> file); returns image_path -> file name.

    Named by a hash, since an image_path may hold anything. Thumbnails that an earlier run left and no
    row shows any more are deleted.
    """
    names = {image_path: hashlib.sha256(image_path.encode("utf-8", "surrogatepass")).hexdigest()[:16] + ".jpg"
             for image_path in pictures}

    def write(image_path):
        picture = _fitted(pictures[image_path], THUMBNAIL_SIZE, THUMBNAIL_SIZE)
        with atomic_write(folder / names[image_path]) as temporary:
            picture.save(temporary, quality=85)

    with ThreadPoolExecutor(THUMBNAIL_THREADS) as threads:
        for _ in tqdm(threads.map(write, pictures), total=len(pictures), desc="thumbnails", unit="picture"):
            pass
    shown = set(names.values())
    for old in sorted(folder.glob("*.jpg")):
        if re.fullmatch(r"[0-9a-f]{16}\.jpg", old.name) and old.name not in shown:
            old.unlink()
    return names
