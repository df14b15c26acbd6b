# SPDX-License-Identifier: Apache-2.0
"""python -m digseg_jax.main --config=configs/NAME.py --workdir=DIR [--mode=train|eval|predict]"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from digseg_jax.errors import UserError
from digseg_jax.log import setup

MODES = ("train", "eval", "predict")

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment file.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run: checkpoints, metrics, report."
)
_MODE = flags.DEFINE_enum("mode", "train", MODES, "train: fine-tune, evaluate and report.")
_IMAGE = flags.DEFINE_string("image", None, "predict: image file, any size and colour mode.")
_QUERY = flags.DEFINE_multi_string("query", None, "predict: what to segment; may be repeated.")
_OUT = flags.DEFINE_string("out", "mask.png", "predict: PNG to write.")


def _required(value: str | None, flag: str, mode: str) -> str:
    if value is None or not value.strip():
        raise UserError(f"--mode={mode} needs --{flag}")
    return value


def run() -> None:
    """Dispatches to the mode; imports late, so that a wrong flag is told before JAX loads."""
    mode = _MODE.value
    if mode == "predict":
        _required(_IMAGE.value, "image", mode)
        if not _QUERY.value:
            raise UserError("--mode=predict needs --query")
    else:
        _required(_WORKDIR.value, "workdir", mode)

    from digseg_jax import config as config_lib
    from digseg_jax import cpu

    cpu.tune()
    config = config_lib.parse(_CONFIG.value)
    if mode == "predict":
        from digseg_jax.predict import predict

        predict(config, _WORKDIR.value, Path(_IMAGE.value), _QUERY.value, Path(_OUT.value))
        return
    from digseg_jax import jobs

    job = jobs.train if mode == "train" else jobs.run_eval
    job(config, Path(_WORKDIR.value))


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    setup()
    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
