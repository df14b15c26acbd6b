# SPDX-License-Identifier: Apache-2.0
"""Encodes all prompts once with the frozen text tower; the train step looks them up by query id."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digseg_jax.arraytypes import Array, Bool, Float, Int, Params
from digseg_jax.errors import UserError
from digseg_jax.models.functional import merge
from digseg_jax.models.text.tokenizer import Tokens


@dataclass(frozen=True)
class PromptBank:
    """Encoded prompts, on the host; row i belongs to `prompts[i]`.

    Attributes:
        prompts: the texts.
        tokens: [n, l, d] last hidden states, as the tower gives them (not normalized), or one vector.
        mask: [n, l] True on tokens that are attended to.
        real: [n, l] True on those of the text itself, which padding is not.
    """

    prompts: tuple[str, ...]
    tokens: Float[np.ndarray, "n l d"]
    mask: Bool[np.ndarray, "n l"]
    real: Bool[np.ndarray, "n l"]


def encode_prompts(
    graphdef: nnx.GraphDef,
    params: Params,
    tokenizer: Callable[[Sequence[str], int], Tokens],
    prompts: Sequence[str],
    *,
    max_length: int,
    batch_size: int = 64,
    mask_padding: bool = True,
    pooled: bool = False,
) -> PromptBank:
    """Encodes prompts in batches of one static shape, so the tower compiles once.

    The tower is on this process's first device while it encodes, and nothing stays there. Products use
    all bits of their factors, which GPUs and TPUs would round.

    Args:
        graphdef: of the text tower, from `models.functional.split`.
        params: of the text tower, on the host.
        tokenizer: texts, length -> `Tokens`.
        prompts: the texts, in the order of the bank's rows.
        max_length: tokens per row, padding included.
        batch_size: prompts per call of the tower; fewer prompts make a smaller batch.
        mask_padding: False: padding counts as text, in the tower and in the bank's mask.
        pooled: keep one token for each prompt, the vector that the tower makes of a text.

    Raises:
        UserError: no prompts, or one that is empty, blank or longer than `max_length` tokens.
    """
    if not prompts:
        raise UserError("no prompts to encode")
    ids, real = tokenizer(prompts, max_length)
    mask = real if mask_padding else np.ones_like(real)

    size = min(batch_size, len(prompts))
    params, parts = jax.device_put(params), []
    for start in range(0, len(prompts), size):
        # The last batch is shifted back to stay full; its first rows are computed twice.
        begin = min(start, len(prompts) - size)
        rows = slice(begin, begin + size)
        with jax.default_matmul_precision("highest"):
            out = _encode(graphdef, params, jnp.asarray(ids[rows]), jnp.asarray(mask[rows]), pooled)
        parts.append(np.asarray(out)[start - begin :])

    if pooled:
        mask = real = np.ones((len(mask), 1), bool)
    tokens = np.concatenate(parts)
    return PromptBank(tuple(prompts), tokens, np.asarray(mask, bool), np.asarray(real, bool))


def with_sentence_token(bank: PromptBank) -> PromptBank:
    """Appends a token to every prompt: the mean of its real tokens, also where padding is attended to.

    Sentence encoders are trained to compare such means, not the states of single words.
    """
    weight = bank.real[..., None].astype(bank.tokens.dtype)
    mean = (bank.tokens * weight).sum(axis=1, keepdims=True) / weight.sum(axis=1, keepdims=True)
    here = np.ones((len(bank.mask), 1), bool)
    return PromptBank(
        bank.prompts,
        np.concatenate([bank.tokens, mean], axis=1),
        np.concatenate([bank.mask, here], axis=1),
        np.concatenate([bank.real, here], axis=1),
    )


def only_sentence_token(bank: PromptBank) -> PromptBank:
    """Leaves of every prompt the token that `with_sentence_token` appends."""
    bank = with_sentence_token(bank)
    return PromptBank(bank.prompts, bank.tokens[:, -1:], bank.mask[:, -1:], bank.real[:, -1:])


@partial(jax.jit, static_argnums=(0, 4))
def _encode(
    graphdef: nnx.GraphDef,
    params: Params,
    ids: Int[Array, "b l"],
    mask: Bool[Array, "b l"],
    pooled: bool,
) -> Float[Array, "b l2 d"]:
    """Hidden states of each token, or one vector for each text."""
    out = merge(graphdef, params)(ids, mask)
    return out.pooled[:, None] if pooled else out.last_hidden_state
