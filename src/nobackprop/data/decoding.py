"""Decodes image files of users and data sets to upright images with 8 bits for each channel."""

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from nobackprop.mistakes import Mistake

# Pillow's formats that data sets use. Others run programs, or read more than an image.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")


def open_image(
    source: BytesIO | Path, where: str, remedy: str, mode: str = "RGB", size: tuple[int, int] | None = None
) -> Image.Image:
    """An image file, decoded, upright as its EXIF data says, and converted to RGB or, with mode "L", grey.

    Of several frames it is the first. Raises Mistake, with `where`, if the file can't be read, or if the image does not
    have that size (width, height). The size is checked before decoding, since a small file may hold a very large image.
    """

    def need_size(found: tuple[int, ...], *turned: tuple[int, ...]) -> None:
        if size is not None and size not in (found, *turned):
            raise Mistake(f"{where} is {found[1]} x {found[0]} pixels; allowed: {size[1]} x {size[0]}. {remedy}")

    try:
        with Image.open(source, formats=FORMATS) as file:
            need_size(file.size, file.size[::-1])
            if file.mode == "F" or file.mode.startswith("I"):  # which Pillow would clip, not scale
                raise Mistake(f"{where} is not a readable image: it has more than 8 bits a channel. {remedy}")
            file.load()
            with suppress(struct.error, KeyError, OSError, SyntaxError, TypeError, ValueError, ZeroDivisionError):
                ImageOps.exif_transpose(file, in_place=True)  # damaged EXIF data is ignored
            need_size(file.size)
            return file.convert(mode)
    except Mistake:
        raise
    except UnidentifiedImageError:
        raise Mistake(f"{where} is not a readable image: it is none of {', '.join(FORMATS)}. {remedy}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all that Pillow raises
        raise Mistake(f"{where} is not a readable image: {error}. {remedy}") from error


@contextmanager
def quiet_decoding() -> Iterator[None]:
    """Silences Pillow's warnings of odd metadata."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield
