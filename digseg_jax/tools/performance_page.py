# SPDX-License-Identifier: Apache-2.0
"""One page about which program fits on which chips, from the compile.json of several workdirs.

python -m digseg_jax.tools.performance_page DIR ... --out=performance.html
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from digseg_jax.aot.programs import FILES
from digseg_jax.aot.table import size
from digseg_jax.errors import UserError
from digseg_jax.runtime.door import run_tool
from digseg_jax.viz.templates import render

COLUMNS = (
    "topology", "program", "images a chip", "mesh", "attention, remat", "fits", "memory", "arguments",
    "temporaries", "touched", "collectives", "roofline images/s a chip", "MFU bound", "compiled in",
)  # fmt: skip


def read(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Reads every compilation in the folders, sorted by topology, program and batch.

    Raises:
      UserError: a folder without a compilation, or a file that is none.
    """
    results = []
    for folder in folders:
        files = [folder / f"{name}.json" for name in sorted(set(FILES.values()))]
        found = [path for path in files if path.is_file()]
        if not found:
            raise UserError(f"{folder}: no {' or '.join(p.name for p in files)} here")

        # A workdir may hold the train step's and the evaluation's.
        for path in found:
            try:
                values = json.loads(path.read_text(encoding="utf-8"))
                results.append({**values, "file": str(path), "key": values["topology"]})
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}: not made by --mode=compile ({error!r})") from error
    return sorted(results, key=lambda r: (r["key"], r["program"], r["images_per_chip"]))


def cells(result: dict[str, Any]) -> list[str]:
    """Cells of a row, in the order of COLUMNS."""
    # A program that the compiler rejected for its memory has no FLOPs; simulated CPUs have no roofline.
    compute, known = result["config"]["compute"], "flops" in result
    mesh = " x ".join(f"{name} {n}" for name, n in result["mesh"].items() if n > 1) or "one chip"
    rate, mfu = result.get("roofline_images_per_second_per_chip"), result.get("mfu_bound")

    return [
        result["topology"],
        result["program"],
        f"{result['images_per_chip']:g}",
        mesh,
        f"{compute['attention']}, {compute['remat']}",
        "yes" if result["fits"] else "NO",
        f"{size(result['hbm_peak_bytes'])} of {size(result['hbm_limit_bytes'])}"
        + (" (estimate)" if result.get("estimate") else ""),
        size(result["hbm_args_bytes"]),
        size(result["hbm_temp_bytes"]),
        size(result["bytes_accessed"]) if known else "–",
        size(result["collective_bytes"]) if known else "–",
        f"{rate:.3g}" if rate else "–",
        f"{mfu:.0%}" if mfu else "–",
        f"{result['compile_seconds']:.0f} s",
    ]


def page(results: Sequence[dict[str, Any]]) -> str:
    """The page as HTML that needs no other file; programs that do not fit are marked in color."""
    rows = [(cells(result), result["fits"]) for result in results]

    # Where the peak rates of the chips are stated.
    sources = sorted({r["chip_source"] for r in results if r.get("chip_source")})
    return render("tools/performance.html.j2", columns=COLUMNS, rows=rows, sources=sources)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m digseg_jax.tools.performance_page", description=__doc__
    )
    parser.add_argument("folders", nargs="+", type=Path, help="workdirs of --mode=compile")
    parser.add_argument("--out", type=Path, default=Path("performance.html"))
    arguments = parser.parse_args(argv)

    def write() -> None:
        arguments.out.write_text(page(read(arguments.folders)), encoding="utf-8")
        print(arguments.out)

    return run_tool(write)


if __name__ == "__main__":
    sys.exit(main())
