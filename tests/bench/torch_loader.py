# SPDX-License-Identifier: Apache-2.0
"""The reference of `bench data`: a torch DataLoader with the same transforms, run on its own.

python torch_loader.py FOLDER SIZE EXAMPLES -> JSON; needs torch, NumPy and Pillow, nothing of ours.
The steps are those of the usual recipes on PIL images: decode, scale the whole image, crop with a
class cap, flip, colors as torchvision's ColorJitter does them, pad, tensor, collate.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance

CAP, TRIES, BATCH = 0.75, 10, 16


class Crops(torch.utils.data.Dataset):
    """FOLDER/images/*.jpg with FOLDER/annotations/*.png; 255 is ignored."""

    def __init__(self, folder: Path, size: int, length: int):
        self.size, self.length = size, length
        self.images = sorted((folder / "images").glob("*.jpg"))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        path = self.images[index % len(self.images)]
        image = Image.open(path).convert("RGB")
        label = Image.open(path.parent.parent / "annotations" / f"{path.stem}.png")
        image, label = self._crop(*self._scale(image, label))
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            label = label.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(colors(image)))
        return pixels, torch.from_numpy(np.array(label).astype(np.int32))

    def _scale(self, image: Image.Image, label: Image.Image) -> tuple[Image.Image, Image.Image]:
        scale = math.exp(random.uniform(math.log(0.5), math.log(2.0)))
        factor = scale * self.size / min(image.size)
        shape = tuple(max(1, round(side * factor)) for side in image.size)
        image = image.resize(shape, Image.Resampling.BILINEAR, reducing_gap=None)
        return image, label.resize(shape, Image.Resampling.NEAREST)

    def _crop(self, image: Image.Image, label: Image.Image) -> tuple[Image.Image, Image.Image]:
        for _ in range(TRIES):
            left = random.randint(0, max(0, image.width - self.size))
            top = random.randint(0, max(0, image.height - self.size))
            box = (left, top, min(left + self.size, image.width), min(top + self.size, image.height))
            ids, counts = np.unique(np.asarray(label.crop(box)), return_counts=True)
            counts = counts[ids != 255]
            if len(counts) > 1 and counts.max() / counts.sum() < CAP:
                break
        return self._padded(image.crop(box), 127), self._padded(label.crop(box), 255)

    def _padded(self, image: Image.Image, fill: int) -> Image.Image:
        if image.size == (self.size, self.size):
            return image
        color = fill if image.mode != "RGB" else (fill,) * 3
        out = Image.new(image.mode, (self.size, self.size), color)
        out.paste(image)
        return out


def colors(image: Image.Image) -> Image.Image:
    """Brightness, contrast, saturation and hue, each with probability 1/2."""
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for kind in kinds:
        if random.random() < 0.5:
            image = kind(image).enhance(random.uniform(0.75, 1.25))
    if random.random() < 0.5:
        hue, saturation, value = image.convert("HSV").split()
        shifted = np.asarray(hue) + np.uint8(random.randint(-12, 12) % 256)
        turned = (Image.fromarray(shifted), saturation, value)
        image = Image.merge("HSV", turned).convert("RGB")
    return image


def main() -> None:
    folder, size, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    loader = torch.utils.data.DataLoader(Crops(folder, size, count + BATCH), batch_size=BATCH)
    batches = iter(loader)
    next(batches)
    start, seen = time.process_time(), 0
    for image, _ in batches:
        seen += len(image)
    print(json.dumps({"crops_per_second": seen / (time.process_time() - start)}))


if __name__ == "__main__":
    main()
