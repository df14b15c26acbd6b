# SPDX-License-Identifier: Apache-2.0
"""Makes bert_minilm.npz: what torch transformers computes with the real all-MiniLM-L6-v2.

Needs torch, transformers and the carrier package: `python tests/golden/make_bert.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, BertModel

from digseg_jax.weights import minilm_folder

PROMPTS = (
    "water",
    "forest",
    "shrub and grass",
    "a satellite picture of snow and ice",
    "Évora's olive-groves, 1998",
    "urban or built-up land",
)
LENGTH = 16
STRIDE = 8  # every eighth channel keeps the file small


def main() -> None:
    """Writes the file beside this script."""
    folder = minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        list(PROMPTS), padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        out = BertModel.from_pretrained(folder).eval()(**batch)
    hidden = out.last_hidden_state.numpy()
    np.savez_compressed(
        Path(__file__).with_name("bert_minilm.npz"),
        prompts=np.array(PROMPTS),
        ids=batch["input_ids"].numpy().astype(np.int32),
        mask=batch["attention_mask"].numpy().astype(bool),
        hidden_slice=hidden[..., ::STRIDE],
        hidden_mean=hidden.mean(-1),
        hidden_std=hidden.std(-1),
        pooled=out.pooler_output.numpy(),
        stride=STRIDE,
    )


if __name__ == "__main__":
    main()
