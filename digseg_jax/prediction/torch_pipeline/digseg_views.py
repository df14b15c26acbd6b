# SPDX-License-Identifier: Apache-2.0
"""Cuts an image of any size into views of one size and joins the views' masks, as in digseg_jax."""

import importlib

import numpy as np
from diffusers.configuration_utils import ConfigMixin, register_to_config
from PIL import Image, ImageOps

OVERLAP = 0.25  # least overlap of neighboring windows, as a share of a window's side


class DigsegViews(ConfigMixin):
    """Cutter of views, configured by preprocessor_config.json.

    size: height and width of a view, pixels. inference: "window", "whole" or "aspect". short_side:
    pixels that an image's short side is scaled to before it is cut into windows; 0: it is not scaled.
    """

    config_name = "preprocessor_config.json"

    @register_to_config
    def __init__(self, size=(512, 512), inference="window", short_side=0):
        pass

    @classmethod
    def from_pretrained(cls, folder, **_):
        """Reads the settings from a folder; the pipeline's other options do not matter here."""
        return cls.from_config(cls.load_config(folder))

    def views(self, image):
        """Returns crops uint8 [h, w, 3], and a function that joins planes [h, w] to one [H, W].

        image: RGB uint8 [H, W, 3], a file, or an image of Pillow.
        """
        image = _pixels(image)

        # Scale the image: to one view, into one view, or to the short side of the windows.
        size, (height, width) = self.config.size, image.shape[:2]
        if self.config.inference == "whole":
            image = _resized(image, *size)
        elif self.config.inference == "aspect":
            scale = min(n / m for n, m in zip(size, (height, width), strict=True))
            fits = (min(n, round(m * scale)) for n, m in zip(size, (height, width), strict=True))
            image = _resized(image, *(max(1, side) for side in fits))
        elif self.config.short_side:
            scale = self.config.short_side / min(height, width)
            image = _resized(image, *(max(1, round(n * scale)) for n in (height, width)))

        # Mirror an image that is smaller than a view below and on the right; one pixel is repeated.
        inner = image.shape[:2]
        pad = [(0, max(n - m, 0)) for n, m in zip(size, inner, strict=True)]
        image = np.pad(image, [*pad, (0, 0)], mode="symmetric" if min(inner) > 1 else "edge")

        # Windows by rows, evenly spread.
        tops, lefts = (_starts(n, s) for n, s in zip(image.shape[:2], size, strict=True))
        places = [(slice(t, t + size[0]), slice(c, c + size[1])) for t in tops for c in lefts]

        # A window's weight falls linearly towards its border, so that seams are blended.
        ramps = (np.minimum(np.arange(1, n + 1), np.arange(n, 0, -1)) / (n / 2) for n in size)
        weight = np.clip(np.outer(*ramps), 1e-3, None)

        def assemble(planes):
            """Weighted mean of the windows, padding cut off, at the image's own size."""
            total, weights = np.zeros(image.shape[:2]), np.zeros(image.shape[:2])
            for place, plane in zip(places, planes, strict=True):
                total[place] += plane * weight
                weights[place] += weight
            plane = (total / weights)[: inner[0], : inner[1]].astype(np.float32)
            return _resized(plane, height, width)

        return [image[place] for place in places], assemble


def _starts(length, size):
    """First pixels of windows that cover `length`, evenly spread, overlapping by OVERLAP or more."""
    count = 1 + int(np.ceil((length - size) / ((1 - OVERLAP) * size)))
    return [int(start) for start in np.linspace(0, length - size, count).round()]


def _resized(image, height, width):
    """The image or plane at another size; unchanged if it has that size."""
    if image.shape[:2] == (height, width):
        return image

    # Imported only if needed, from the package opencv-python-headless.
    cv2 = importlib.import_module("cv2")  # pip install opencv-python-headless

    # Only images are averaged when they shrink; masks are interpolated, as in digseg_jax.
    shrinks = image.ndim == 3 and height * width < image.shape[0] * image.shape[1]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=how)


def _pixels(image):
    """RGB uint8 [H, W, 3], turned by the EXIF orientation; white behind transparent pixels."""
    if isinstance(image, np.ndarray):
        return image
    image = ImageOps.exif_transpose(image if isinstance(image, Image.Image) else Image.open(image))

    # Of more than 8 bits the smallest value becomes 0 and the largest 255, where they differ.
    if image.mode == "F" or image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.float64)
        finite = np.isfinite(wide)
        low, high = wide[finite].min(), wide[finite].max()
        gray = (
            np.rint(np.where(finite, wide - low, 0) * (255 / (high - low)))
            if high > low
            else wide * 0 + low // 256
        )
        return np.repeat(np.clip(gray, 0, 255).astype(np.uint8)[..., None], 3, axis=-1)

    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))
