"""How a picture file becomes pixels: one way for building, training, answering and the gallery."""
import struct

from PIL import Image

MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # 89 million, 268 MB decoded; Pillow alone would only warn up to twice of that
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")  # Pillow's rarer decoders raise anything, one runs PostScript
KEPT_BLOCKS = 16
ORIENTATION = 0x0112  # the EXIF tag that says how the camera was held
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}
DAMAGED_EXIF = (OSError, ValueError, SyntaxError, LookupError, TypeError, AttributeError, ArithmeticError, struct.error)
# what Pillow raises for files that are broken in one way or another
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)


def open_image(path):
    """The first frame of a picture file as an upright RGB Pillow image, decoded completely.

    Raises one of UNREADABLE where the file is no picture, is cut off, or is too large to be one.
    """
    with Image.open(path, formats=FORMATS) as picture:
        check_size(picture)
        picture.load()
        turn = UPRIGHT.get(orientation(picture))
        # ImageOps.exif_transpose would write the EXIF block anew, which fails in many ways where it is damaged
        picture = picture.transpose(turn) if turn is not None else picture
    if picture.mode.startswith("I;16") or picture.mode == "I":
        # .convert("RGB") would saturate: 16-bit grey becomes 8-bit grey first
        picture = picture.convert("I").point(lambda value: value / 257).convert("L")
    if picture.mode in ("P", "PA", "LA", "RGBA"):
        flat = picture.convert("RGBA")
        picture = Image.new("RGBA", flat.size, "white")
        picture.alpha_composite(flat)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def orientation(picture):
    """The EXIF orientation, 1 to 8; 1 (upright) where there is none, or none that can be read."""
    try:
        value = picture.getexif().get(ORIENTATION, 1)
    except DAMAGED_EXIF:
        return 1
    return value if isinstance(value, int) else 1


def keep_memory():
    """Let Pillow keep some blocks of memory for the next picture: getting them anew costs as much as the decoding."""
    Image.core.set_blocks_max(KEPT_BLOCKS)


def check_size(picture):
    """Raise ValueError where a picture, whose header alone was read, is too large to be decoded."""
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(f"{picture.width} x {picture.height} pixels are too many, at most {MAX_PIXELS:,} are decoded")
