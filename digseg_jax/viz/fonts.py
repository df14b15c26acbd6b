# SPDX-License-Identifier: Apache-2.0
"""Text of a legend: a font that has its letters, and what is written where none of them has."""

from __future__ import annotations

import functools
import unicodedata

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Fonts of many scripts as Linux, macOS and Windows install them; Pillow looks for them in the system's
# folders. Its own font, which comes first, has the letters of English only.
FILES = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc",
    "Arial Unicode.ttf", "arialuni.ttf", "arial.ttf", "Arial.ttf", "PingFang.ttc", "msyh.ttc",
    "msgothic.ttc", "malgun.ttf",
)  # fmt: skip
_NO_LETTER = "\uffff"  # belongs to no font, so that it is drawn as a missing letter


def fitting(text: str, number: int, size: int) -> tuple[str, Font]:
    """A text as it can be drawn here, and the font for it.

    The text itself if some font has all of its letters, else without accents, else #NUMBER.

    size: height of the text, pixels.
    """
    # A letter and its accent are one sign in most fonts.
    text = unicodedata.normalize("NFC", text)
    own = _bundled(size)
    if has(own, text):
        return text, own
    for file in FILES:
        font = _installed(file, size)
        if font is not None and has(font, text):
            return text, font

    # "foret" is still read as "forêt"; of other scripts only the number is left.
    plain = unicodedata.normalize("NFKD", text)
    plain = "".join(sign for sign in plain if not unicodedata.combining(sign))
    return (plain if has(own, plain) else f"#{number}"), own


def shortened(text: str, font: Font, room: float) -> str:
    """The text, cut at its end and marked with dots if it is wider than `room` pixels."""
    if font.getlength(text) <= room:
        return text
    dots = "…" if has(font, "…") else "..."
    for length in range(len(text) - 1, 0, -1):
        cut = text[:length].rstrip() + dots
        if font.getlength(cut) <= room:
            return cut
    return ""


def has(font: Font, text: str) -> bool:
    """Whether a font has every letter of a text."""
    missing = _drawn(font, _NO_LETTER)
    return all(_drawn(font, sign) != missing for sign in set(text) if not sign.isspace())


def _drawn(font: Font, sign: str) -> tuple[tuple[int, int], bytes]:
    """Size and pixels of a sign."""
    drawn = font.getmask(sign)
    return drawn.size, bytes(drawn)


@functools.lru_cache(maxsize=8)
def _bundled(size: int) -> Font:
    """Pillow's own font, which is the same on every machine."""
    return ImageFont.load_default(size=size)


@functools.lru_cache(maxsize=64)
def _installed(file: str, size: int) -> ImageFont.FreeTypeFont | None:
    """A font of this machine; None without it."""
    try:
        return ImageFont.truetype(file, size)
    except OSError:
        return None
