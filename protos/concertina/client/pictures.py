"""Pictures as they are sent: made, and told from other files, without NumPy and Pillow."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Mapping
from typing import IO, Any, Final, Protocol, runtime_checkable

from concertina.client.errors import InvalidRequest
from concertina.shown import shown

PNG: Final = b"\x89PNG\r\n\x1a\n"
"""What a PNG begins with."""
# Raw pixels may have the first bytes of a file, too: what has to follow in a file counts as well.
_JPEG: Final = re.compile(rb"\xff\xd8\xff[\xc0-\xcf\xdb-\xfe](..)", re.DOTALL)
_MARKER: Final = re.compile(rb"\xff[\xc0-\xfe]")
_PPM: Final = re.compile(rb"P[1-6]\s+(#[^\n]*\n\s*)*\d+\s+(#[^\n]*\n\s*)*\d+\s")
_ORIENTATION: Final = 0x0112
_PNG_COLOURS: Final = {1: 0, 2: 4, 3: 2, 4: 6}  # by the number of channels


@runtime_checkable
class PillowImage(Protocol):
    """The part of `PIL.Image.Image` that a prompt needs: the client works without Pillow."""

    def save(self, fp: IO[bytes], format: str | None = ..., *, exif: bytes = ...) -> None: ...

    def getexif(self) -> Mapping[int, object]: ...


class PixelArray(Protocol):
    """The part of a NumPy array that a prompt needs: the client works without NumPy."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def tobytes(self) -> bytes: ...


def check_raw(rgb: bytes) -> None:
    """Raises InvalidRequest for a picture file that would be taken for raw pixels."""
    name = _file_format(rgb)
    if name:
        raise InvalidRequest(
            f"prompt is a {name} file of {len(rgb):,} bytes, and bytes have to be PNG or raw "
            "RGB: open it, for example with PIL.Image.open(io.BytesIO(data)), and give the image",
            field="prompt",
        )


def _file_format(data: bytes) -> str:
    """The format of a picture file; empty for anything else."""
    if found := _JPEG.match(data):  # its first segment says how long it is, and another follows
        after = 4 + int.from_bytes(found[1], "big")
        return "JPEG" if _MARKER.match(data, after) else ""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data[:2] == b"BM" and data[6:10] == bytes(4) and _little(data[2:6]) == len(data):
        return "BMP"
    if data.startswith((b"II*\0", b"MM\0*")):
        first = int.from_bytes(data[4:8], "little" if data[:1] == b"I" else "big")
        return "TIFF" if 8 <= first < len(data) else ""
    return "PPM" if _PPM.match(data) else ""


def _little(data: bytes) -> int:
    return int.from_bytes(data, "little")


def png_of_array(array: PixelArray) -> bytes:
    """A picture as PNG, which says how wide it is: bytes alone do not. Raises InvalidRequest."""
    height, width, *channels = array.shape
    items = str(array.dtype)
    if items != "uint8" or len(channels) > 1 or (channels or [1])[0] not in _PNG_COLOURS:
        raise InvalidRequest(
            f"prompt is an array of {items} with the shape {shown(tuple(array.shape))}: a picture "
            "is of uint8, [height, width] or [height, width, channels], with 1 to 4 channels",
            field="prompt",
        )
    if not height or not width:
        raise InvalidRequest(f"prompt is a picture of {width}x{height} pixels", field="prompt")
    depth = (channels or [1])[0]
    data, row = array.tobytes(), width * depth
    lines = b"".join(b"\0" + data[at : at + row] for at in range(0, len(data), row))
    header = struct.pack(">IIBBBBB", width, height, 8, _PNG_COLOURS[depth], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return PNG + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def png_of_image(image: PillowImage) -> bytes:
    """An image as PNG. Its orientation goes with it, since the server turns images upright."""
    orientation = image.getexif().get(_ORIENTATION)
    exif = b""
    if isinstance(orientation, int) and 1 < orientation <= 8:
        # One big-endian table of EXIF with one entry: the orientation, a 16-bit integer.
        entry = struct.pack(">HHIHH", _ORIENTATION, 3, 1, orientation, 0)
        exif = b"Exif\0\0" + struct.pack(">2sHIH", b"MM", 42, 8, 1) + entry + bytes(4)
    png = io.BytesIO()
    try:
        image.save(png, format="PNG", exif=exif)
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"the image cannot be sent as PNG ({error}): convert it first, for example with "
            'image.convert("RGB")'
        ) from None
    return png.getvalue()
