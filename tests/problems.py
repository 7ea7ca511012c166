"""Random decode problems in which everything that must not be read is poisoned."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np

UNUSED_TABLE_ENTRY = 2147480000
PAGE = 64
# Around the parts of a block that a sequence's last one may have.
SHORT_ENDS = (1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 97, 130)


@dataclasses.dataclass
class Problem:
    """Operands of one decode, as NumPy arrays."""

    q: np.ndarray
    k_cache: np.ndarray
    block_table: np.ndarray
    cache_seqlens: np.ndarray

    @property
    def arrays(self):
        return self.q, self.k_cache, self.block_table, self.cache_seqlens

    @property
    def q_pair(self):
        return self.q[..., :512], self.q[..., 512:]

    def resize_keys(self, by):
        """Multiplies keys with powers of two, of all or of each column; scores keep every bit."""
        self.q[:] = self.q.astype(np.float32) / by
        self.k_cache[:] = self.k_cache.astype(np.float32) * by


def with_neighbours(rng, lengths, before):
    """The lengths in random order, and one of `before` in front of each."""
    return np.stack([np.full(len(lengths), before), rng.permutation(lengths)], 1).ravel()


def make_problem(
    rng,
    lengths,
    *,
    s_q=1,
    h_q=16,
    h_kv=1,
    dtype=jnp.bfloat16,
    max_blocks=None,
    shared_pages=256,
    page=PAGE,
    width=576,
):
    """Draws a problem for sequences of the given lengths.

    Pages lie in the pool in random order. Pages that no sequence names, the tails of last pages and
    the columns of a row past the 576th are NaN, table entries past a sequence's end are absurd.
    Where there are more than `shared_pages` full pages, sequences share them, as servers share
    prefixes.
    """
    lengths = np.asarray(lengths, np.int32)
    full, tails = lengths // page, lengths % page
    num_full = min(int(full.sum()), shared_pages)
    num_last = int((tails > 0).sum())
    num_blocks = num_full + num_last + 5
    ids = rng.permutation(num_blocks).astype(np.int32)

    k_cache = _normal(rng, (num_blocks, page, h_kv, width), dtype)
    k_cache[..., 576:] = np.nan
    k_cache[ids[num_full + num_last :]] = np.nan
    needed = int((full + (tails > 0)).max(initial=0))
    max_blocks = max_blocks or needed + 3
    block_table = np.full((len(lengths), max_blocks), UNUSED_TABLE_ENTRY, np.int32)
    full_pages = _cycle_shuffled(rng, ids[:num_full])
    last_pages = iter(ids[num_full : num_full + num_last])
    for i, (count, tail) in enumerate(zip(full, tails, strict=True)):
        block_table[i, :count] = list(itertools.islice(full_pages, int(count)))
        if tail:
            last = next(last_pages)
            block_table[i, count] = last
            k_cache[last, tail:] = np.nan
    q = _normal(rng, (len(lengths), s_q, h_q, 576), dtype)
    return Problem(q, k_cache, block_table, lengths)


def make_unpaged_problem(rng, lengths, max_len, **options):
    """The same without a table: `k_cache [b, max_len, h_kv, width]`, NaN past each length.

    `block_table` is the one of the same cache as pages of `max_len` tokens, for references.
    """
    page = np.arange(len(lengths), dtype=np.int32)[:, None]
    problem = make_problem(rng, lengths, page=max_len, max_blocks=1, shared_pages=10**6, **options)
    k_cache = np.full((len(lengths), *problem.k_cache.shape[1:]), np.nan, problem.q.dtype)
    named = problem.cache_seqlens > 0
    k_cache[named] = problem.k_cache[problem.block_table[named, 0]]
    return dataclasses.replace(problem, k_cache=k_cache, block_table=page)


def pack(rng, q, most, spare=3):
    """Random numbers of the queries `[b, most, ..]`, right-aligned: packed ones and their cuts.

    Queries past the last cut are NaN.
    """
    counts = rng.integers(0, most + 1, len(q))
    counts[rng.integers(len(q))] = most
    packed = [x[most - count :] for x, count in zip(q, counts, strict=True)]
    packed.append(np.full((spare, *q.shape[2:]), np.nan, q.dtype))
    return np.concatenate(packed), np.append(0, np.cumsum(counts)).astype(np.int32)


def stack(problems):
    """Problems of equal shapes as one with a leading group axis."""
    return Problem(
        *(np.stack(arrays) for arrays in zip(*(p.arrays for p in problems), strict=True))
    )


def _normal(rng, shape, dtype):
    return rng.standard_normal(shape, np.float32).astype(dtype)


def _cycle_shuffled(rng, items):
    while len(items):
        yield from rng.permutation(items)


def pairwise_cover(factors, is_valid, cost):
    """Cases in which every pair of values of two factors that can occur together does.

    Args:
      factors: a dict from name to values.
      is_valid: whether a case, a dict from name to value, may be tested.
      cost: of a case; cheap cases are preferred.
    """
    cases = [
        dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())
    ]
    cases = sorted(filter(is_valid, cases), key=cost)
    pairs = {
        id(case): set(itertools.combinations(sorted(case.items(), key=repr), 2)) for case in cases
    }
    uncovered = set().union(*pairs.values())
    chosen = []
    while uncovered:
        best = max(cases, key=lambda case: len(pairs[id(case)] & uncovered))
        uncovered -= pairs[id(best)]
        chosen.append(best)
    return chosen
