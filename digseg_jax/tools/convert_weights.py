# SPDX-License-Identifier: Apache-2.0
"""python -m digseg_jax.tools.convert_weights SOURCE [OUT]: a pickled checkpoint to safetensors, once.

For checkpoints that are published only as pickles, such as BiomedCLIP. Needs an environment with torch;
nothing else in this project opens a pickle. It is opened with `weights_only=True`, which rejects a file
that holds more than tensors instead of running its code.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from digseg_jax.errors import UserError
from digseg_jax.runtime.door import run_tool
from digseg_jax.weights.hub import (
    COMPANIONS,
    SCHEDULER,
    TOKENIZER,
    converted_folder,
    resolve_pickles,
)
from digseg_jax.weights.safetensors_io import DIFFUSERS_STEM, OPEN_CLIP_STEM, TRANSFORMERS_STEM

# stem of the pickle -> stem of the safetensors file
STEMS = {
    "diffusion_pytorch_model": DIFFUSERS_STEM,
    "pytorch_model": TRANSFORMERS_STEM,
    "open_clip_pytorch_model": OPEN_CLIP_STEM,
}


def convert(source: str | Path, out: str | Path | None = None) -> Path:
    """Converts the tensors of `source` to one safetensors file; copies the files beside them.

    Args:
        source: a folder, a hub id[:subfolder], or a name of `digseg_jax.weights.catalog`.
        out: folder to write, which `load_component` reads; None: where `resolve` looks for the source's
            name, beside the hub's cache, or the source folder itself.

    Returns:
        The weight file.

    Raises:
        UserError: torch is missing, no pickle is found, or it holds more than tensors.
    """
    torch = _torch()
    folder = resolve_pickles(source, tuple(STEMS))
    stem, files = _pickles(folder)
    tensors: dict[str, Any] = {}
    for file in files:
        tensors |= _tensors(torch, file)
    from safetensors.torch import save_file

    # Configuration and tokenizer go along, so that the folder is a complete component.
    out = converted_folder(source) if out is None else Path(out)
    out.mkdir(parents=True, exist_ok=True)
    beside = {"text_encoder": folder.parent / TOKENIZER, "unet": folder.parent / SCHEDULER}
    places = [folder, *filter(None, [beside.get(folder.name)])]  # a pipeline has some beside it
    for name in COMPANIONS:
        place = next((place / name for place in places if (place / name).is_file()), None)
        if place and place.parent.resolve() != out.resolve():
            shutil.copyfile(place, out / name)
    target = out / f"{STEMS[stem]}.safetensors"

    # Tied tensors share memory, which safetensors rejects: store copies.
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, target, {"format": "pt"})
    return target


def _torch() -> Any:
    """The torch module.

    Raises:
      UserError: it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "converting a pickled checkpoint needs torch, which this project does not install: "
            "run this command once in an environment that has it"
        ) from error
    return torch


def _pickles(folder: Path) -> tuple[str, list[Path]]:
    """Stem and files of a folder's checkpoint, which may be split into several files.

    Raises:
      UserError: no checkpoint of a known name.
    """
    for stem in STEMS:
        files = [folder / f"{stem}.bin"]
        if not files[0].is_file():
            files = sorted(folder.glob(f"{stem}-*-of-*.bin"))
        if files:
            return stem, files
    raise UserError(f"no {', '.join(f'{stem}.bin' for stem in STEMS)} in {folder}")


def _tensors(torch: Any, file: Path) -> dict[str, Any]:
    """Tensors of one file by name.

    Raises:
      UserError: not a pickle that torch can read, or one that holds more than tensors.
    """
    try:
        values = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling and zip errors of many types
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{file} is not a checkpoint of tensors only: {reason}") from error

    # Trainers wrap the tensors in "state_dict", and data-parallel ones prefix the names with "module.".
    values = values.get("state_dict", values) if isinstance(values, dict) else values
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no tensors by name, but a {type(values).__name__}")
    other = [key for key, value in values.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise UserError(f"{file} holds more than tensors: {', '.join(map(str, other[:3]))}")
    return {key.removeprefix("module."): value for key, value in values.items()}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m digseg_jax.tools.convert_weights")
    parser.add_argument("source", help="folder, hub id[:subfolder] or known name with a pickle")
    parser.add_argument(
        "out", nargs="?", help="folder to write; by default the one where the source's name finds it"
    )
    args = parser.parse_args(argv)
    return run_tool(lambda: print(f"wrote {convert(args.source, args.out)}"))


if __name__ == "__main__":
    sys.exit(main())
