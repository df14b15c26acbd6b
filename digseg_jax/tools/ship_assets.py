# SPDX-License-Identifier: Apache-2.0
"""Copy of a run's weights into the package, as float16.

    python -m digseg_jax.tools.ship_assets NAME [RUN] [--scores=suite_domains.json]

The recipe's command, the main settings and the terms go into the metadata. Weights that were trained on
data with terms of their own get a LICENSE, and a model card with the scores of --scores. Without RUN,
segmenter.json is written for the shipped segmenter, from the recipe that its metadata name.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np

from digseg_jax import trees
from digseg_jax.arraytypes import Params
from digseg_jax.assets import FOLDER, LICENSE
from digseg_jax.config.experiment import load_config
from digseg_jax.config.parse import to_dict
from digseg_jax.data.datasets.domains import DOMAINS, Domain
from digseg_jax.errors import UserError
from digseg_jax.io.json_file import read_json
from digseg_jax.io.workdir import CALIBRATION, CONFIG_NAME, EXPORT
from digseg_jax.models import functional
from digseg_jax.prediction import description as description_lib
from digseg_jax.prediction import model_card as model_card_lib
from digseg_jax.prediction.description import (
    describe,
    read_description,
    unet_folder,
    write_description,
)
from digseg_jax.prediction.export import CARD
from digseg_jax.prediction.model_card import model_card
from digseg_jax.runtime.door import run_tool
from digseg_jax.weights import load_component, read_metadata, save_component

# asset -> the recipe in configs/ that makes it
RECIPES = {
    "vae": "landcover_vae",
    "prior": "landcover_prior",
    "segmenter": "landcover",
    "generalist": "generalist",
}
OWN_DATA = "NASA Blue Marble and MODIS MCD12C1 2019, training blocks only"
_TERMS = """\
For non-commercial research only: several of the data sets of the training allow nothing else.

These weights, and weights derived from them, were trained on the images and labels of

{data}

The code of digseg_jax and its other weights are under the Apache License 2.0. These weights are not:
they may be used for non-commercial research only. Whoever passes them on does so under the same terms,
with this file.
"""


def ship(run: Path, name: str, scores: Path | None = None) -> Path:
    """Writes assets/NAME from RUN/export; returns the weight file.

    scores: suite_domains.json of an evaluation of these weights, for the model card.
    """
    export = run / EXPORT
    folder = FOLDER / name
    earlier = read_description(folder) if (folder / description_lib.FILE).is_file() else None
    trained = unet_folder(export)
    model = load_component(trained)
    params = jax.tree.map(lambda x: np.asarray(x, np.float16), functional.split(model)[1])

    # Everything that is needed to make the weights again goes into the file itself.
    config = json.loads((run / CONFIG_NAME).read_text(encoding="utf-8"))
    domains = _domains_of(export)
    metadata = read_metadata(trained) | {
        "command": f"python -m digseg_jax.main --config=configs/{RECIPES[name]}.py --workdir=DIR",
        "data": ", ".join(domain.name for domain in domains) or OWN_DATA,
        "train": json.dumps(config["train"]),
        "license": f"see {LICENSE}" if domains else "Apache-2.0",
    }
    model_config = model.config  # type: ignore[attr-defined]  # every model has one
    again = any(folder.glob("*.safetensors")) and _holds(folder, params)
    written = save_component((model_config, params), folder, metadata=metadata)

    # A segmenter comes with its calibration and description; the other assets have neither.
    for beside in (CALIBRATION, description_lib.FILE):
        if (export / beside).is_file():
            shutil.copyfile(export / beside, folder / beside)
        else:
            (folder / beside).unlink(missing_ok=True)

    # Weights that were trained on: their steps count from where the first training began.
    made = read_description(folder) if (folder / description_lib.FILE).is_file() else None
    if made and earlier and made.started_from == f"assets:{name}":
        # The same weights once more, with their scores, were counted before.
        steps = earlier.steps + (0 if again else made.steps)
        start = earlier.started_from
        write_description(folder, dataclasses.replace(made, steps=steps, started_from=start))

    # The terms of the data bind the weights.
    if domains:
        listed = "\n".join(f"- {domain.name}: {domain.terms}" for domain in domains)
        (folder / LICENSE).write_text(_TERMS.format(data=listed), encoding="utf-8")
        found = read_json(scores) if scores else None
        card = model_card(read_description(folder), found, asset=f"assets:{name}")
        (folder / CARD).write_text(card, encoding="utf-8")
    return written


def _holds(folder: Path, params: Params) -> bool:
    """Whether the folder has these parameters already."""
    there = trees.flatten(functional.split(load_component(folder))[1])
    here = trees.flatten(params)
    return there.keys() == here.keys() and all(np.array_equal(there[path], here[path]) for path in here)


def _domains_of(export: Path) -> list[Domain]:
    """The domains that a segmenter was trained on; none if it knows the package's own data only."""
    if not (export / description_lib.FILE).is_file():
        return []
    trained = set(read_description(export).datasets)
    return [d for d in DOMAINS if d.name in trained] if trained - model_card_lib.OWN_DATA else []


def describe_shipped(name: str) -> Path:
    """Writes assets/NAME/segmenter.json from the recipe that made the weights; returns its path.

    The library versions of that run are not known and stay empty.

    Raises:
      UserError: by their metadata, the weights were made by another recipe.
    """
    folder = FOLDER / name
    metadata = read_metadata(folder)
    config = load_config(RECIPES[name])

    # A recipe edited since would describe weights that it never made.
    stored, values = json.loads(metadata["train"]), to_dict(config)["train"]
    changed = [key for key in stored.keys() & values.keys() if stored[key] != values[key]]
    if changed or int(metadata["seed"]) != config.seed or metadata["task"] != config.task:
        raise UserError(
            f"{folder}: made by another recipe than configs/{RECIPES[name]}.py is now "
            f"({', '.join(changed) or 'another task or seed'}); ship the weights of a new run"
        )

    params = functional.split(load_component(folder))[1]
    made = describe(config, params, int(metadata["steps"]))
    write_description(folder, dataclasses.replace(made, versions={}))
    return folder / description_lib.FILE


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m digseg_jax.tools.ship_assets", description=__doc__)
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("run", type=Path, nargs="?", help="working directory of an exported run")
    parser.add_argument("--scores", type=Path, help="suite_domains.json of these weights")
    arguments = parser.parse_args()

    if arguments.run is not None:
        sys.exit(run_tool(lambda: print(ship(arguments.run, arguments.name, arguments.scores))))
    elif arguments.name == "segmenter":
        sys.exit(run_tool(lambda: print(describe_shipped(arguments.name))))
    else:
        parser.error(f"{arguments.name} needs RUN: only a segmenter has a description of its own")


if __name__ == "__main__":
    main()
