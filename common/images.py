"""Reads an image file: the same way for building the data, training, answering and the gallery."""
import contextlib
import math
import struct
import threading
from pathlib import Path

import numpy as np
from PIL import AvifImagePlugin, Image, UnidentifiedImageError

from common.files import refuse_device

MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # 89 million, 358 MB decoded; Pillow alone only warns up to twice that number
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF")  # Pillow's other decoders are less safe
HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"}
KEPT_BLOCKS = 16  # of memory, which Pillow reuses for the next images
BLOCK_BYTES = 1 << 26  # of the largest block: glibc would keep freed blocks of 32 MB or less in the process
LARGE = 1 << 22  # pixels: after a larger image no blocks are kept
UNIT = 1 << 20  # pixels: unit of the budget, and size of the strips in which images are converted
BUDGET = 2 * MAX_PIXELS // UNIT  # units; a pixel takes 8 bytes while it is decoded and converted, and 16 in WebP
ORIENTATION = 0x0112  # the EXIF tag of the camera's orientation
SAMPLE_FORMAT = 0x0153  # the TIFF tag that says what the values are
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}
DAMAGED_EXIF = (OSError, ValueError, SyntaxError, LookupError, TypeError, AttributeError, ArithmeticError, struct.error)
# errors that Pillow raises for damaged files; RuntimeError is AVIF's
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, struct.error, Image.DecompressionBombError)
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # images are decoded side by side: their decoders need no threads of their own


class Budget:
    """Bounds the memory of the images that are decoded at the same time. Images below one megapixel do not count.

    `context`: the module `threading`, or a context of `multiprocessing` if processes share the budget.
    """

    def __init__(self, context=threading):
        self.lock, self.units = context.Lock(), context.Semaphore(BUDGET)

    @contextlib.contextmanager
    def hold(self, num_pixels):
        """Wait until there is room for an image of `num_pixels`, which must not exceed MAX_PIXELS."""
        needed = num_pixels // UNIT
        if needed:
            with self.lock:  # one at a time: two that have half of their units would wait for each other
                for _ in range(needed):
                    self.units.acquire()
        try:
            yield
        finally:
            if num_pixels > LARGE:
                Image.core.clear_cache()  # the blocks of `keep_memory`
            for _ in range(needed):
                self.units.release()


BUDGET_OF_THREADS = Budget()


def open_image(path, use=None, budget=BUDGET_OF_THREADS):
    """The first frame of an image file as an upright RGB Pillow image, decoded completely; or what `use(image)` returns.

    `path` may be a Pillow image too, which stays open. What is transparent becomes white. The image counts in `budget`
    until `use` returns. Raises one of UNREADABLE if the file is no image, is truncated, is empty, or has more than
    MAX_PIXELS pixels.
    """
    image = path if isinstance(path, Image.Image) else identify(path)
    if not 0 < image.width * image.height <= MAX_PIXELS:
        if image is not path:
            image.close()
        size = f"{image.width} x {image.height} pixels"
        raise ValueError(f"{size} are too many, at most {MAX_PIXELS:,} are decoded" if 0 not in image.size else
                         f"{size}: it is empty")
    with budget.hold(image.width * image.height):
        with contextlib.nullcontext() if image is path else image:
            scale_transparent_value(image)
            image.load()
            transpose, limits = UPRIGHT.get(orientation(image)), limits_of_values(image)
        # each step frees the image of the step before
        # ImageOps.exif_transpose would rewrite the EXIF block, which fails in many ways if the block is damaged
        image = image.transpose(transpose) if transpose is not None else image
        image = to_rgb(image, limits)
        if use is not None:
            image = use(image)
        return image


def identify(path):
    """Open an image and read its header. Raises one of UNREADABLE."""
    if isinstance(path, str | Path):
        refuse_device(path)
    try:
        return Image.open(path, formats=FORMATS)
    except UnidentifiedImageError:
        if not is_heic(path):
            raise
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise ValueError(f"a HEIC image, which needs `pip install pillow-heif`; without it {', '.join(FORMATS)} are "
                         "read") from None
    return HeifImageFile(path)


def is_heic(path):
    """Whether a file, or a stream of bytes, begins like the images of iPhones."""
    with contextlib.nullcontext(path) if hasattr(path, "read") else open(path, "rb") as stream:
        stream.seek(0)
        head = stream.read(12)
        stream.seek(0)
    return head[4:8] == b"ftyp" and head[8:] in HEIC_BRANDS


def orientation(image):
    """The EXIF orientation, 1 to 8. It is 1 (upright) if there is none or it cannot be read."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except DAMAGED_EXIF:
        return 1
    return value if isinstance(value, int) else 1


def scale_transparent_value(image):
    """Scale the transparent colour (tRNS) of a PNG like its pixels. Pillow does this only for 1 and 8 bits.

    Call it before the image is decoded: afterwards the number of bits is lost.
    """
    value = image.info.get("transparency")
    bits = image.tile[0][3] if value is not None and image.format == "PNG" and image.tile else None
    if bits in ("L;2", "L;4"):
        image.info["transparency"] = value * (85 if bits == "L;2" else 17)
    elif bits == "RGB;16B":
        image.info["transparency"] = tuple(part >> 8 for part in value)


def limits_of_values(image):
    """(value of black, value of white, whether values are unsigned) of floats or 32-bit integers; None for other images.

    Floats from 0 to 1, and numbers from 0 to 255, keep these limits. Others are stretched from the lowest to the highest.
    """
    if image.mode != "F" and (image.mode, image.format) != ("I", "TIFF"):
        return None
    unsigned = image.mode == "I" and image.tag_v2.get(SAMPLE_FORMAT, 1) in (1, (1,))
    lowest, highest = math.inf, -math.inf
    for box in strips(image.size):
        values = values_of(image.crop(box), unsigned)
        values = values[np.isfinite(values)]
        lowest, highest = min(lowest, values.min(initial=math.inf)), max(highest, values.max(initial=-math.inf))
    for white in (1, 255) if image.mode == "F" else (255,):
        if lowest >= 0 and highest <= white:
            return 0, white, unsigned
    return float(lowest), float(highest), unsigned


def values_of(image, unsigned):
    """The values of an image of floats or integers as floats (height, width). Pillow takes unsigned ones for signed."""
    values = np.asarray(image)
    return (values.view(np.uint32) if unsigned else values).astype(np.float64)


def strips(size):
    """Boxes of at most UNIT pixels (one row at least) that together cover an image of this size."""
    width, height = size
    rows = max(1, UNIT // width)
    return [(0, top, width, min(top + rows, height)) for top in range(0, height, rows)]


def to_rgb(image, limits):
    """An image of any mode as RGB. Copies in between are made of strips, not of the whole image."""
    transparent = "transparency" in image.info or image.mode in ("P", "PA", "LA", "RGBA")
    if image.mode == "RGB" and not transparent:
        return image
    rgb = Image.new("RGB", image.size)
    for box in strips(image.size):
        strip = image.crop(box)
        if limits is not None or image.mode[0] == "I":
            strip = to_grey(strip, limits)
        if transparent:
            white = Image.new("RGBA", strip.size, "white")
            white.alpha_composite(strip.convert("RGBA"))
            strip = white
        rgb.paste(strip.convert("RGB"), box)
    return rgb


def to_grey(image, limits):
    """An image of floats or of more than 8 bits, scaled to grey of 8 bits, with alpha if it has a transparent value."""
    # .convert("L") alone would clip the values
    if limits is not None:
        black, white, unsigned = limits
        values = np.nan_to_num(values_of(image, unsigned), nan=black, posinf=white, neginf=black)
        return Image.fromarray(((values - black) * (255 / ((white - black) or 1))).round().astype(np.uint8))
    grey = image.convert("I").point(lambda value: value / 257).convert("L")  # 16 bits
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.asarray(image) != image.info["transparency"]).convert("L"))
    return grey


def keep_memory():
    """Let Pillow reuse some blocks of memory for the next image: allocating them anew costs as much as decoding."""
    Image.core.set_block_size(BLOCK_BYTES)
    Image.core.set_blocks_max(KEPT_BLOCKS)
