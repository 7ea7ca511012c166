"""MLA decode in float64 NumPy, one sequence and one query token at a time; append, row by row."""

import itertools

import numpy as np


def decode(
    q,
    k_cache,
    block_table,
    cache_seqlens,
    softmax_scale=576**-0.5,
    causal=False,
    rounded_to=None,
    sliding_window=None,
    logits_soft_cap=None,
):
    """Returns out [b, s_q, h_q, 512] and lse [b, h_q, s_q], float64.

    Reads only the valid part of what it is given, and 576 columns of it. Page ids outside the pool
    read as zeros. With `rounded_to`, a 16-bit dtype, weights and results are rounded to it: what a
    plain computation would do, whose error sets the scale for others.
    """

    def rounded(x):
        return x if rounded_to is None else x.astype(rounded_to).astype(np.float64)

    q, block_table, cache_seqlens = (np.asarray(x) for x in (q, block_table, cache_seqlens))
    k_cache = np.asarray(k_cache)
    batch, s_q, h_q, _ = q.shape
    num_blocks, page, h_kv, _ = k_cache.shape
    heads_per_kv = h_q // h_kv
    out = np.zeros((batch, s_q, h_q, 512))
    lse = np.full((batch, h_q, s_q), -np.inf)
    for i in range(batch):
        length = int(np.clip(cache_seqlens[i], 0, block_table.shape[1] * page))
        keys = np.zeros((length, h_kv, 576))
        for start in range(0, length, page):
            page_id, stop = int(block_table[i, start // page]), min(start + page, length)
            if 0 <= page_id < num_blocks:
                keys[start:stop] = k_cache[page_id, : stop - start, :, :576]
        for token in range(s_q):
            visible = length - s_q + 1 + token if causal else length
            if visible <= 0:
                continue
            for head in range(h_kv):
                rows = slice(head * heads_per_kv, (head + 1) * heads_per_kv)
                seen = keys[max(0, visible - (sliding_window or visible)) : visible, head]
                scores = softmax_scale * (q[i, token, rows].astype(np.float64) @ seen.T)
                if logits_soft_cap is not None:
                    scores = logits_soft_cap * np.tanh(scores / logits_soft_cap)
                top = scores.max(axis=1, keepdims=True)
                weights = np.exp(scores - top)
                total = weights.sum(axis=1, keepdims=True)
                out[i, token, rows] = rounded(rounded(weights) @ seen[:, :512] / total)
                lse[i, rows, token] = (top + np.log(total))[:, 0]
    return out, lse


def append(k_cache, new_kv, block_table, cache_seqlens):
    """The cache of one group with the newest rows in it; everything else as it was."""
    k_cache = k_cache.copy()
    page_size = k_cache.shape[1]
    batch, s_q = new_kv.shape[:2]
    for i in range(batch):
        for token in range(s_q):
            position = int(cache_seqlens[i]) - s_q + token
            if 0 <= position < block_table.shape[1] * page_size:
                page = block_table[i, position // page_size]
                if 0 <= page < len(k_cache):
                    k_cache[page, position % page_size, :, : new_kv.shape[-1]] = new_kv[i, token]
    return k_cache


def decode_packed(q, k_cache, block_table, cache_seqlens, cuts, **options):
    """The same for packed queries: out [total, h_q, 512] and lse [h_q, total].

    `cuts`, which must be sound, says which queries are whose. Others give 0 and -inf.
    """
    total, h_q, _ = q.shape
    out, lse = np.zeros((total, h_q, 512)), np.full((h_q, total), -np.inf)
    for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
        one = slice(i, i + 1)
        part = decode(q[None, start:stop], k_cache, block_table[one], cache_seqlens[one], **options)
        out[start:stop], lse[:, start:stop] = part[0][0], part[1][0]
    return out, lse


def append_packed(k_cache, new_kv, block_table, cache_seqlens, cuts):
    """The same as `append` for packed rows."""
    for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
        one = slice(i, i + 1)
        k_cache = append(k_cache, new_kv[None, start:stop], block_table[one], cache_seqlens[one])
    return k_cache
