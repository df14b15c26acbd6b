# SPDX-License-Identifier: Apache-2.0
"""Makes clip_small.npz: what torch transformers and open_clip compute for small seeded towers.

Needs torch, transformers and `pip install --no-deps open_clip_torch`:
`python tests/golden/make_clip.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
from oracle import GOLDEN, fill_torch
from towers import CLIP, torch_model, torch_open_clip, torch_outputs


def main() -> None:
    """Writes the file beside this script."""
    outputs = {}
    for name in (*CLIP, "open_clip"):
        model = torch_open_clip() if name == "open_clip" else torch_model(CLIP[name])
        fill_torch(model)
        outputs[f"{name}_tokens"], outputs[f"{name}_pooled"] = torch_outputs(name, model)
    np.savez_compressed(GOLDEN / "clip_small.npz", **outputs)


if __name__ == "__main__":
    main()
