# SPDX-License-Identifier: Apache-2.0
"""python -m digseg_jax.assets RUN NAME: puts a finished run's weights into the package as float16.

The recipe's command, the configuration's essentials and what was measured go into the metadata.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import jax
import numpy as np

from digseg_jax.assets import FOLDER
from digseg_jax.models import functional
from digseg_jax.weights import load_component, read_metadata, save_component
from digseg_jax.workdir import CONFIG_NAME, EXPORT

RECIPES = {"vae": "landcover_vae", "prior": "landcover_prior", "segmenter": "landcover"}


def ship(run: Path, name: str) -> Path:
    """Writes assets/NAME from RUN/export; returns the weight file."""
    export = run / EXPORT
    model = load_component(export)
    params = jax.tree.map(lambda x: np.asarray(x, np.float16), functional.split(model)[1])
    config = json.loads((run / CONFIG_NAME).read_text(encoding="utf-8"))
    metadata = read_metadata(export) | {
        "command": f"python -m digseg_jax.main --config=configs/{RECIPES[name]}.py --workdir=DIR",
        "data": "NASA Blue Marble and MODIS MCD12C1 2019, training blocks only",
        "train": json.dumps(config["train"]),
        "license": "Apache-2.0",
    }
    folder = FOLDER / name
    written = save_component((model.config, params), folder, metadata=metadata)
    if (export / "calibration.json").is_file():
        shutil.copyfile(export / "calibration.json", folder / "calibration.json")
    return written


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m digseg_jax.assets", description=__doc__)
    parser.add_argument("run", type=Path, help="working directory of a finished run")
    parser.add_argument("name", choices=sorted(RECIPES))
    arguments = parser.parse_args()
    print(ship(arguments.run, arguments.name))


if __name__ == "__main__":
    main()
