# SPDX-License-Identifier: Apache-2.0
"""python -m rehearsal.worker: runs `main` for each line of its input, a JSON list of arguments.

Answers each with a line of JSON on its first output: null, or the traceback. One process for many
commands imports JAX once; what it prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

# elements from which fsdp splits an array; no miniature has one of the product's 2**16
SPLIT_FROM = 2**10
# the train step's bank has a multiple of so many texts: data sets share one compiled program
BANK_ROWS = 1024


def main() -> None:
    """Answers until its input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a command prints
    from digseg_jax import log
    from digseg_jax.runtime import cpu

    cpu.tune()
    log.setup()
    import jax

    from digseg_jax.runtime import sharding

    sharding.FSDP_MIN_SIZE = SPLIT_FROM
    pad_banks()
    for line in sys.stdin:
        answer = None
        try:
            run(json.loads(line))
        except BaseException:
            answer = traceback.format_exc()
        jax.clear_caches()
        print(json.dumps(answer), file=answers, flush=True)


def pad_banks() -> None:
    """Fills banks up to BANK_ROWS rows; no query asks for those behind the data set's own texts."""
    import numpy as np

    from digseg_jax.training.tasks import parts

    whole = parts.bank_arrays

    def padded(bank):
        arrays = whole(bank)
        missing = -len(arrays["mask"]) % BANK_ROWS
        rows = {name: [(0, missing)] + [(0, 0)] * (np.ndim(x) - 1) for name, x in arrays.items()}
        return {name: np.pad(x, rows[name]) for name, x in arrays.items()}

    parts.bank_arrays = padded


def run(arguments: list[str]) -> None:
    """`python -m digseg_jax.main ARGUMENTS`, but that it returns and raises."""
    from absl import flags

    from digseg_jax import main as command

    # the overrides of the command before are flags still
    for name in [n for n in flags.FLAGS if n.startswith("config.")]:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
    sys.argv = ["main", *arguments]  # where ml_collections looks for overrides
    command.parse_flags(sys.argv)
    command.run()


if __name__ == "__main__":
    main()
