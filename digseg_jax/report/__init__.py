# SPDX-License-Identifier: Apache-2.0
"""The page that a run leaves behind, and the images in it."""

from digseg_jax.report.build import build_report
from digseg_jax.viz.gallery import GalleryItem, write_gallery
from digseg_jax.viz.images import class_colors, legend, overlay, paint

__all__ = [
    "GalleryItem", "build_report", "class_colors", "legend", "overlay", "paint", "write_gallery",
]  # fmt: skip
