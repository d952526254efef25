"""Texts in drawn images. Their font is DejaVu Sans, and for characters that it lacks any font of this machine. No torch."""
import functools
import re
import textwrap
from pathlib import Path

import matplotlib
from matplotlib.font_manager import findSystemFonts
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

MAX_TEXT = 600  # characters


@functools.cache
def base_font(size, bold=False):
    """DejaVu Sans, which matplotlib brings along: it looks the same on every machine, but has no Hindi, Thai or Chinese."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return _open(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


_open = functools.cache(ImageFont.truetype)


@functools.cache
def characters_of(path):
    """The characters (frozenset of code points) that a font file can draw at any size; none if the file is damaged."""
    try:
        font = FT2Font(path)
        return frozenset(font.get_charmap() if font.scalable else ())
    except (OSError, RuntimeError):
        return frozenset()


@functools.cache
def installed_fonts():
    """The paths of all font files of this machine, plain ones first."""
    return sorted(findSystemFonts(), key=lambda path: ("Regular" not in path, "Sans" not in path, path))


@functools.cache
def other_font(character):
    """The path of an installed font that has `character`, or None."""
    return next((path for path in installed_fonts() if ord(character) in characters_of(path)), None)


def runs(text, font):
    """`text` as [(font, piece)]. Another font draws what `font` lacks, and goes on as long as it has the characters.

    So the words of one script stay in one piece, whose letters are joined and ordered together.
    """
    pieces = []
    path = start = font.path
    for character in text:
        if character.isprintable() and ord(character) not in characters_of(path):  # joiners stay where they are
            path = start if ord(character) in characters_of(start) else other_font(character) or path
        if pieces and pieces[-1][0] == path:
            pieces[-1][1] += character
        else:
            pieces.append([path, character])
    return [(_open(path, font.size), piece) for path, piece in pieces]


def text_width(text, font):
    """The width of `text` in pixels, drawn as `runs`."""
    return sum(piece_font.getlength(piece) for piece_font, piece in runs(text, font))


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


def report_missing_characters(texts):
    """Print which characters of `texts` no font can draw, if there are any."""
    known = characters_of(base_font(12).path)
    missing = [character for character in sorted(set("".join(texts)))
               if character.isprintable() and ord(character) not in known and not other_font(character)]
    if missing:
        print(f"no installed font has {''.join(missing):.60}: the images show boxes in their place; install fonts, for example "
              "by `apt-get install fonts-noto-core fonts-noto-cjk`; the page index.html uses the fonts of the browser")
