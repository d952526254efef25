"""Answered questions as images: single ones with their answers or with an explanation, and the overview. No torch.

`rows` are those of `results.result_rows`.
"""
import math
from collections import Counter

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from common.files import atomic_write
from common.images import UNREADABLE, open_image
from common.plotting import ACCENT, BAND, HAIRLINE, INK, MUTED, PARTLY, RIGHT, WRONG
from evaluation.fonts import base_font, text_width, wrap, write_text
from vocab import GLUE, tokenize

FUNCTION_WORDS = tuple("a an the and or but of in on at to from with by for up under above next is are it its his her".split())
SIZE_WORDS = ("big", "small", "large", "little", "tiny", "huge", "tall", "short", "long")
GRADES = {"right": ("✓", "right", RIGHT), "partly": ("≈", "partly right", PARTLY), "wrong": ("✗", "wrong", WRONG)}
PAPER, MAT = "#ffffff", "#f0f0ec"
IMAGE_WIDTH, IMAGE_HEIGHT, MARGIN, GAP = 960, 736, 44, 28  # a 4:3 image fills the width
INNER_WIDTH = IMAGE_WIDTH - 2 * MARGIN
WHY_WIDTH, WHY_MARGIN, WHY_SIZE = 680, 30, 23  # the explanation: narrow, with large letters, as phones show it too
WHY_INNER = WHY_WIDTH - 2 * WHY_MARGIN
CELL_WIDTH, CELL_GAP = 420, 28
MAX_ANSWERS_SHOWN, MAX_LINES = 6, 8
MAP_CELLS = 8  # along each side of the relevance map: relevance.STRIPS, whose module needs torch
LEAST_SCALE = 0.5  # nats; without it, the noise of an image that does not matter would get the strongest colour
WEAK = 0.25        # nats; a map that stays below it is nearly white, and the caption says so


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
    y = write_text(draw, MARGIN, image.height + 34, row["question"], base_font(34, True), INK, INNER_WIDTH, 4) + 22
    draw.line((MARGIN, y, IMAGE_WIDTH - MARGIN, y), fill=HAIRLINE, width=2)
    middle = MARGIN + int(INNER_WIDTH * 0.54)
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


def draw_explanation(explanation):
    """A Pillow image of why the model answered so. explanation: from `relevance.explain`.

    What the model sees, and the same under the relevance map; the words of the question, coloured by relevance; the words
    of the answer, coloured by probability; confidence, gate, and the beam's other answers.
    """
    answer, relevance, words = explanation.answer, explanation.image_relevance, explanation.question_words
    panels = _draw_panels(explanation.view, relevance / relevance_scale(relevance))
    sheet, draw = new_sheet(panels, WHY_WIDTH, panels.height + 2 * GAP, 6000)
    y = _draw_legend(sheet, draw, panels.height + 2 * GAP + 14, relevance) + 26

    scale = relevance_scale([nats for _, nats in words])
    title = ("Question: no word changes the answer" if not any(nats for _, nats in words) else
             f"Question: fall in nats without the word (darkest: {scale:.1f})")
    y = _draw_words(draw, y, title, base_font(30),
                    [(word, signed(nats), relevance_colours(nats / scale)) for word, nats in words]) + 20
    y = _draw_words(draw, y, "Answer: probability of each word", base_font(36, True),
                    [(word, f"{share:.2f}", shade("Blues", share, 0.42)) for word, share in answer.word_probabilities]) + 20
    draw.line((WHY_MARGIN, y, WHY_WIDTH - WHY_MARGIN, y), fill=HAIRLINE, width=2)
    middle = WHY_MARGIN + int(WHY_INNER * 0.48)
    left = _draw_shares(draw, answer, WHY_MARGIN, y + 22, middle - WHY_MARGIN - 30)
    right = _draw_alternatives(draw, answer, middle, y + 22, WHY_WIDTH - WHY_MARGIN - middle)
    return sheet.crop((0, 0, WHY_WIDTH, max(left, right) + 30))


def relevance_scale(relevance):
    """The nats that get the strongest colour."""
    return max(LEAST_SCALE, float(np.max(relevance, initial=0.0)))


def signed(nats):
    return f"{round(nats, 1) or 0:.1f}".replace("-", "−")


def relevance_colours(shares):
    return shade("Oranges", shares, 0.72)


def shade(name, shares, strongest):
    """RGB, uint8, of one number or an array: 0 and less is nearly white, 1 the colour at `strongest` of matplotlib's map.

    The colours of these maps get steadily darker, so they differ without their hues too. Black text is readable on all.
    """
    colours = np.array(matplotlib.colormaps[name](np.clip(shares, 0, 1) * strongest, bytes=True))
    return colours[..., :3]


def _draw_panels(view, shares):
    """The view, and beside it the view in grey under the colours of `shares` (height, width) of the scale."""
    width = (WHY_INNER - GAP) // 2
    size = width, round(width * view.height / view.width)
    panels = Image.new("RGB", (2 * width + GAP, size[1]), MAT)
    panels.paste(view.resize(size, Image.Resampling.BICUBIC), (0, 0))
    grey = np.asarray(view.convert("L").resize(size, Image.Resampling.BICUBIC))[..., None]
    cells = Image.fromarray(shares.astype(np.float32)).resize((MAP_CELLS, MAP_CELLS), Image.Resampling.BOX)
    shares = cells.resize(size, Image.Resampling.BICUBIC)  # smooth: their edges mean nothing
    coloured = relevance_colours(shares) * (0.45 + 0.55 * grey / 255)  # no black, which would hide the colours
    panels.paste(Image.fromarray(coloured.round().astype(np.uint8)), (width + GAP, 0))
    return panels


def _draw_legend(sheet, draw, y, relevance):
    """The size of the view, the scale of the map, and what it means. Returns the y below them."""
    width, font = (WHY_INNER - GAP) // 2, base_font(WHY_SIZE)
    right, changes = WHY_MARGIN + width + GAP, relevance.any()
    end = write_text(draw, WHY_MARGIN, y, "what the model sees", font, MUTED, width, 1)
    end = write_text(draw, WHY_MARGIN, end, f"{relevance.shape[1]} × {relevance.shape[0]} pixels", font, MUTED, width, 1)
    if changes:
        sheet.paste(Image.fromarray(np.tile(relevance_colours(np.linspace(0, 1, width)), (14, 1, 1))), (right, y + 7))
        draw.rectangle((right, y + 7, right + width - 1, y + 20), outline=HAIRLINE)
        draw.text((right, y + 25), "0", font=font, fill=INK)
        draw.text((right + width, y + 25), f"{relevance_scale(relevance):.1f} nats", font=font, fill=INK, anchor="ra")
    text = ("no part of it changes the answer" if not changes else
            "no single place matters much; the answer may rest on the whole image" if relevance.max() < WEAK else
            "fall of the answer's log probability if the place is hidden; 2.3 nats leave a tenth of the probability")
    return write_text(draw, WHY_MARGIN, end + 14, f"Image: {text}", font, MUTED, WHY_INNER, 3)


def _draw_words(draw, y, title, font, words):
    """A title, and (word, note, colour) as coloured boxes in lines, each with its note below. Returns the y below them."""
    small, x, height = base_font(WHY_SIZE), WHY_MARGIN, round(font.size * 1.4)
    y = write_text(draw, x, y, title, small, MUTED, WHY_INNER, 2) + 8
    last_y = y + (MAX_LINES - 1) * (height + 38)
    # a word gets one box, a text that is written without spaces may get several
    boxes = [(line, *rest) for word, *rest in words for line in wrap(word, font, WHY_INNER - 20, MAX_LINES)]
    for text, note, colour in boxes:
        width = round(max(text_width(text, font), small.getlength(note))) + 20
        if x + width > WHY_MARGIN + WHY_INNER:
            if y == last_y:
                write_text(draw, x, y, "…", font, INK, WHY_MARGIN, 1)
                break
            x, y = WHY_MARGIN, y + height + 38
        draw.rounded_rectangle((x, y, x + width, y + height), 6, tuple(colour.tolist()))
        write_text(draw, x + (width - text_width(text, font)) / 2, y + round(font.size * 0.1), text, font, INK, width, 1)
        draw.text((x + width / 2, y + height + 3), note, font=small, fill=INK, anchor="ma")
        x += width + 8
    return y + height + 34


def _draw_shares(draw, answer, x, y, width):
    """Bars of confidence and gate. Returns the y below them."""
    shares = [("confidence: product of the probabilities", answer.confidence)]
    if answer.gate is not None:
        shares.append(("gate: weight of the image in the mix", answer.gate))
    for title, share in shares:
        y = write_text(draw, x, y, title, base_font(WHY_SIZE), MUTED, width, 2) + 6
        draw_bar(draw, (x, y + 10, x + width - 70, y + 19), share, ACCENT)
        y = write_text(draw, x + width - 56, y, f"{share:.2f}", base_font(WHY_SIZE), INK, 60, 1) + 14
    return y


def _draw_alternatives(draw, answer, x, y, width):
    """The beam's other answers with their probabilities. Returns the y below them."""
    font, others = base_font(WHY_SIZE), answer.alternatives[:MAX_ANSWERS_SHOWN]
    y = write_text(draw, x, y, "Other answers of the beam" if others else "No other answer", font, MUTED, width, 2) + 8
    for text, confidence in others:
        draw.text((x + width, y), f"{confidence:.2f}", font=font, fill=INK, anchor="ra")
        y = write_text(draw, x, y, text or "(no words)", font, INK, width - 70, 2) + 1
        draw_bar(draw, (x, y, x + width, y + 3), confidence, MUTED)
        y += 12
    return write_text(draw, x, y, search_note(answer), font, MUTED, width, 4)


def search_note(answer):
    """A sentence if the beam found an answer that is more probable than the one given; else ""."""
    better = any(confidence > answer.confidence for _, confidence in answer.alternatives)
    return "An answer is found word by word, so it need not be the most probable one." * better


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


def draw_bar(draw, box, share, colour):
    """A bar filled to `share` (0 to 1) of its box (left, top, right, bottom)."""
    left, top, right, bottom = box
    draw.rectangle(box, fill=BAND)
    if filled := round((right - left) * share):
        draw.rectangle((left, top, left + filled, bottom), fill=colour)
