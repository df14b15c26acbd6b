# SPDX-License-Identifier: Apache-2.0
"""Lets the browser tests use the made-up run of the folder above."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
