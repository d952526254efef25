"""Answered questions as images: single ones with their answers, and the overview. No torch.

`rows` are those of `results.result_rows`.
"""
import math
import re
import textwrap
from collections import Counter

from PIL import Image, ImageDraw

from common.files import atomic_write
from common.images import UNREADABLE, open_image
from common.plotting import ACCENT, BAND, HAIRLINE, INK, MUTED, PARTLY, RIGHT, WRONG
from evaluation.fonts import base_font, runs, text_width
from vocab import GLUE, tokenize

FUNCTION_WORDS = tuple("a an the and or but of in on at to from with by for up under above next is are it its his her".split())
SIZE_WORDS = ("big", "small", "large", "little", "tiny", "huge", "tall", "short", "long")
GRADES = {"right": ("✓", "right", RIGHT), "partly": ("≈", "partly right", PARTLY), "wrong": ("✗", "wrong", WRONG)}
PAPER, MAT = "#ffffff", "#f0f0ec"
IMAGE_WIDTH, IMAGE_HEIGHT, MARGIN = 960, 736, 44  # a 4:3 image fills the width
CELL_WIDTH, CELL_GAP = 420, 28
MAX_ANSWERS_SHOWN, MAX_TEXT = 6, 600


def grade(row):
    """"right", "partly" or "wrong"; None if the row has no label.

    "right": the prediction equals the label. "partly": an annotator gave it, or it holds at least half of the label's
    distinct content words. The page states this rule.
    """
    if row["exact_match"] is None:
        return None
    if row["exact_match"] >= 100:
        return "right"
    words = content_words(row["answer"])
    found = words & {token.removeprefix(GLUE) for token in tokenize(row["prediction"])}
    return "partly" if row["vqa_accuracy"] > 0 or 2 * len(found) >= len(words) else "wrong"


def content_words(label):
    """The set of the label's words without marks, FUNCTION_WORDS and SIZE_WORDS; all its tokens if no word is left."""
    tokens = {token.removeprefix(GLUE) for token in tokenize(label)}
    return {token for token in tokens.difference(FUNCTION_WORDS, SIZE_WORDS) if token[0].isalnum()} or tokens


def count_answers(row):
    """The annotations with their counts, most frequent first, then in annotation order: list of (text, n)."""
    return Counter(row["answers"] or ([row["answer"]] if row["answer"] else [])).most_common()


def drawn_texts(rows):
    """All texts that images of `rows` show."""
    return [text for row in rows for text in (row["question"], row["prediction"], row["answer"], *row["answers"])]


def draw_prediction(row, path):
    """Write one answered question as a PNG: the image; below it question, prediction, confidence and annotations."""
    image = fitted(row["image_file"], IMAGE_WIDTH, IMAGE_HEIGHT)
    sheet, draw = new_sheet(image, IMAGE_WIDTH, image.height, 1400)
    inner = IMAGE_WIDTH - 2 * MARGIN
    y = write_text(draw, MARGIN, image.height + 34, row["question"], base_font(34, True), INK, inner, 4) + 22
    draw.line((MARGIN, y, IMAGE_WIDTH - MARGIN, y), fill=HAIRLINE, width=2)
    middle = MARGIN + int(inner * 0.54)
    left = _draw_model(draw, row, MARGIN, y + 24, middle - MARGIN - 40)
    right = _draw_annotations(draw, row, middle, y + 24, IMAGE_WIDTH - MARGIN - middle)
    with atomic_write(path) as temporary:
        sheet.crop((0, 0, IMAGE_WIDTH, max(left, right) + 36)).save(temporary)


def new_sheet(image, width, height, room):
    """(sheet, its ImageDraw): a mat of `width` x `height` with the image in the middle, and `room` for text below it."""
    sheet = Image.new("RGB", (width, height + room), PAPER)
    sheet.paste(MAT, (0, 0, width, height))
    sheet.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return sheet, ImageDraw.Draw(sheet)


def _draw_model(draw, row, x, y, width):
    """The left column: prediction, grade, confidence. Returns the y below it."""
    mark, word, colour = GRADES.get(grade(row), ("", "", INK))
    y = write_text(draw, x, y, "Model", base_font(19), MUTED, width, 1) + 6
    y = write_text(draw, x, y, row["prediction"] or "(no words)", base_font(36, True), colour, width, 4) + 4
    if mark:
        y = write_text(draw, x, y, f"{mark} {word}", base_font(24, True), colour, width, 1) + 4
    y += 18
    draw_bar(draw, (x, y + 10, x + width - 210, y + 19), row["confidence"], ACCENT)
    return write_text(draw, x + width - 192, y - 1, f"confidence {row['confidence']:.2f}", base_font(22), INK, 200, 1)


def _draw_annotations(draw, row, x, y, width):
    """The right column: the annotations with their counts and shares. Returns the y below it."""
    answers = count_answers(row)
    total = sum(n for _, n in answers)
    title = f"{total} annotators" if total > 1 else "One annotator" if total else "No annotations"
    y = write_text(draw, x, y, title, base_font(19), MUTED, width, 1) + 10
    indent = 50 if total > 1 else 0  # room for the counts
    for text, n in answers[:MAX_ANSWERS_SHOWN]:
        bold = text == row["answer"] and total > 1
        end = write_text(draw, x + indent, y, text, base_font(24, bold), INK, width - indent, 2)
        if total > 1:
            draw.text((x + 34, y), str(n), font=base_font(24, bold), fill=INK, anchor="ra")
            draw_bar(draw, (x + indent, end + 1, x + width, end + 3), n / total, INK if bold else MUTED)
        y = end + 15
    if len(answers) > MAX_ANSWERS_SHOWN:
        y = write_text(draw, x, y, f"and {len(answers) - MAX_ANSWERS_SHOWN} other answers", base_font(19), MUTED, width, 1)
    return y


def draw_overview(rows, path, columns=4):
    """Write image, question, prediction and label of all `rows` on one sheet, `columns` across."""
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
    """One cell of the overview, as high as its words need."""
    box = CELL_WIDTH * 3 // 4
    cell, draw = new_sheet(fitted(row["image_file"], CELL_WIDTH, box), CELL_WIDTH, box, 420)
    mark, word, colour = GRADES.get(grade(row), ("", "", INK))
    y = write_text(draw, 0, box + 14, row["question"], base_font(22), INK, CELL_WIDTH, 3) + 6
    prediction = f"{mark} {row['prediction'] or '(no words)'}".strip()
    y = write_text(draw, 0, y, prediction, base_font(24, True), colour, CELL_WIDTH, 2)
    if word != "right" and row["answer"]:
        y = write_text(draw, 0, y, f"label: {row['answer']}", base_font(20), INK, CELL_WIDTH, 2)
    notes = f"{word} · " * bool(word) + f"confidence {row['confidence']:.2f}"
    return cell.crop((0, 0, CELL_WIDTH, write_text(draw, 0, y + 2, notes, base_font(18), MUTED, CELL_WIDTH, 1) + 8))


def fitted(path, width, height, enlarge=True):
    """The image scaled to fill the width or the height; without `enlarge` a smaller image keeps its size.

    An unreadable file raises OSError with its name.
    """
    def resize(image):
        scale = min(width / image.width, height / image.height, math.inf if enlarge else 1)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)

    try:
        return open_image(path, resize)
    except UNREADABLE as error:
        raise OSError(f"{path} cannot be read as an image ({error}); repair it or leave its rows out") from error


def write_text(draw, x, y, text, font, fill, width, max_lines):
    """Write `text` wrapped to `width` pixels and at most `max_lines`; returns the y below it."""
    for line in wrap(text, font, width, max_lines):
        at, baseline = x, y + font.getmetrics()[0]
        for piece_font, piece in runs(line, font):
            draw.text((at, baseline), piece, font=piece_font, fill=fill, anchor="ls")
            at += piece_font.getlength(piece)
        y += round(font.size * 1.32)
    return y


def wrap(text, font, width, max_lines):
    """Lines of `text` no wider than `width` pixels; an ellipsis marks what exceeds `max_lines`.

    Control characters count as spaces. The line length in characters is the longest one that fits.
    """
    text = " ".join(re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", " ", text[:MAX_TEXT]).split())
    for length in range(max(1, len(text)), 0, -1):
        lines = textwrap.wrap(text, length, max_lines=max_lines, placeholder="…", break_on_hyphens=False)
        if all(text_width(line, font) <= width for line in lines):
            break
    return lines


def draw_bar(draw, box, share, colour):
    """A bar filled to `share` (0 to 1) of its box (left, top, right, bottom)."""
    left, top, right, bottom = box
    draw.rectangle(box, fill=BAND)
    if filled := round((right - left) * share):
        draw.rectangle((left, top, left + filled, bottom), fill=colour)
