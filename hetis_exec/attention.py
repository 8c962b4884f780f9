"""Attention kernels in NumPy, float64."""

from __future__ import annotations

import numpy as np

from hetis_exec.messages import Array


def attend(queries: Array, keys: Array, values: Array) -> Array:
    """Decode attention of one new token.

    Shapes: queries (groups, heads per group, d), keys and values (groups, tokens, d); the
    result is shaped like the queries.
    """
    scores = np.matmul(queries, keys.transpose(0, 2, 1)) / np.sqrt(queries.shape[-1])
    result: Array = np.matmul(softmax(scores), values)
    return result


def attend_causal(queries: Array, keys: Array, values: Array) -> Array:
    """Prefill attention: the queries belong to the last of the tokens.

    Shapes: queries (groups, heads per group, new tokens, d), keys and values (groups, tokens, d);
    the result is shaped like the queries.
    """
    new, total = queries.shape[2], keys.shape[1]
    scores = np.matmul(queries, keys.transpose(0, 2, 1)[:, None]) / np.sqrt(queries.shape[-1])
    future = np.arange(total)[None, :] > np.arange(total - new, total)[:, None]
    result: Array = np.matmul(softmax(np.where(future, -np.inf, scores)), values[:, None])
    return result


def softmax(scores: Array) -> Array:
    """Over the last axis."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    result: Array = weights / weights.sum(axis=-1, keepdims=True)
    return result
