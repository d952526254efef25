"""Reads an image file: the same way for building the data, training, answering and the gallery."""
import struct
from pathlib import Path

from PIL import Image

from common.files import refuse_device

MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # 89 million, 268 MB decoded; Pillow alone only warns up to twice that number
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")  # Pillow's other decoders are less safe
KEPT_BLOCKS = 16
ORIENTATION = 0x0112  # the EXIF tag of the camera's orientation
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}
DAMAGED_EXIF = (OSError, ValueError, SyntaxError, LookupError, TypeError, AttributeError, ArithmeticError, struct.error)
# errors that Pillow raises for damaged files
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)


def open_image(path):
    """The first frame of an image file as an upright RGB Pillow image, decoded completely.

    Raises one of UNREADABLE if the file is no image, is truncated, or has more than MAX_PIXELS pixels.
    """
    if isinstance(path, str | Path):
        refuse_device(path)
    with Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many, at most {MAX_PIXELS:,} are decoded")
        image.load()
        transpose = UPRIGHT.get(orientation(image))
        # ImageOps.exif_transpose would rewrite the EXIF block, which fails in many ways if the block is damaged
        image = image.transpose(transpose) if transpose is not None else image
    if image.mode.startswith("I;16") or image.mode == "I":
        # .convert("RGB") would saturate: 16-bit grey becomes 8-bit grey first
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if image.mode in ("P", "PA", "LA", "RGBA"):
        transparent = image.convert("RGBA")
        image = Image.new("RGBA", transparent.size, "white")
        image.alpha_composite(transparent)
    return image if image.mode == "RGB" else image.convert("RGB")


def orientation(image):
    """The EXIF orientation, 1 to 8. It is 1 (upright) if there is none or it cannot be read."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except DAMAGED_EXIF:
        return 1
    return value if isinstance(value, int) else 1


def keep_memory():
    """Let Pillow reuse some blocks of memory for the next image: allocating them anew costs as much as decoding."""
    Image.core.set_blocks_max(KEPT_BLOCKS)
