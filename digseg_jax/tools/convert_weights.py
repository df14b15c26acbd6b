# SPDX-License-Identifier: Apache-2.0
"""python -m digseg_jax.tools.convert_weights SOURCE [OUT]: a pickled checkpoint to safetensors, once.

For checkpoints that are published only as pickles, such as BiomedCLIP. Runs where torch is
installed; nothing else in this project opens a pickle. Opened with `weights_only=True`, so that
a file holding more than tensors is refused rather than run.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from digseg_jax.errors import UserError
from digseg_jax.weights.hub import COMPANIONS, converted_folder, resolve_pickles
from digseg_jax.weights.safetensors_io import DIFFUSERS_STEM, OPEN_CLIP_STEM, TRANSFORMERS_STEM

STEMS = {  # stem of the pickle -> of the safetensors file
    "diffusion_pytorch_model": DIFFUSERS_STEM,
    "pytorch_model": TRANSFORMERS_STEM,
    "open_clip_pytorch_model": OPEN_CLIP_STEM,
}


def convert(source: str | Path, out: str | Path | None = None) -> Path:
    """Writes `out` with the tensors of `source` as one safetensors file, and the files beside them.

    Args:
        source: a folder, a hub id[:subfolder], or a name of `digseg_jax.weights.catalog`.
        out: folder to write, which `load_component` reads; None: where `resolve` looks for the
            source's name itself, beside the hub's cache, or the folder that is the source.

    Returns:
        The weight file.

    Raises:
        UserError: torch is missing, no pickle found, or it holds more than tensors.
    """
    torch = _torch()
    folder = resolve_pickles(source, tuple(STEMS))
    stem, files = _pickles(folder)
    tensors: dict[str, Any] = {}
    for file in files:
        tensors |= _tensors(torch, file)
    from safetensors.torch import save_file

    out = converted_folder(source) if out is None else Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for name in COMPANIONS:
        if (folder / name).is_file() and folder.resolve() != out.resolve():
            shutil.copyfile(folder / name, out / name)
    target = out / f"{STEMS[stem]}.safetensors"
    # tied tensors share memory, which safetensors does not store
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, target, {"format": "pt"})
    return target


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "converting a pickled checkpoint needs torch, which this project does not install: "
            "run this command once in an environment that has it"
        ) from error
    return torch


def _pickles(folder: Path) -> tuple[str, list[Path]]:
    for stem in STEMS:
        files = [folder / f"{stem}.bin"]
        if not files[0].is_file():
            files = sorted(folder.glob(f"{stem}-*-of-*.bin"))
        if files:
            return stem, files
    raise UserError(f"no {', '.join(f'{stem}.bin' for stem in STEMS)} in {folder}")


def _tensors(torch: Any, file: Path) -> dict[str, Any]:
    try:
        values = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling and zip errors of many types
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{file} is not a checkpoint of tensors only: {reason}") from error
    values = values.get("state_dict", values)
    other = [key for key, value in values.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise UserError(f"{file} holds more than tensors: {', '.join(map(str, other[:3]))}")
    return {key.removeprefix("module."): value for key, value in values.items()}


def main(argv: list[str] | None = None) -> None:
    """The command line; exits with status 2 after a UserError."""
    parser = argparse.ArgumentParser(prog="python -m digseg_jax.tools.convert_weights")
    parser.add_argument("source", help="folder, hub id[:subfolder] or known name with a pickle")
    parser.add_argument(
        "out", nargs="?", help="folder to write; by default one where the source's name finds it"
    )
    args = parser.parse_args(argv)
    try:
        print(f"wrote {convert(args.source, args.out)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
