"""The plan of a decode step: which thread-block partition works on which blocks. The reference.

A *block* is 64 tokens of one sequence. The work of a step is the blocks of all sequences, in order;
it is cut into `num_sm_parts` consecutive *partitions* of nearly equal cost, one per group of thread
blocks. A sequence that a cut falls into is computed in several *splits*, one per partition that
touches it, and the decode combines their results.

Layout of the two results (int32):

`tile_scheduler_metadata [num_sm_parts, 8]`, one row per partition:

    column   0          1            2        3          4            5..7
             begin_seq  begin_block  end_seq  end_block  begin_split  zero

Partition p computes every block from position (begin_seq, begin_block) up to, not including,
position (end_seq, end_block), sequences in order. A position names a block by its sequence and its
index in it; (i, 0) is also the end of sequence i-1, and (b, 0) the end of everything. The end of p
is the begin of p+1. A partition whose begin equals its end has nothing to do. A sequence of length
0 has one position, (i, 0), and no split: nobody computes it. `begin_split` is the index,
within begin_seq, of the split that p computes first; p's later sequences start at split 0. The
splits of a sequence are in consecutive partitions.

`num_splits [b + 1]`: exclusive prefix sum of the splits per sequence (at least 1, or 0 of an empty
one): the splits of sequence i have the slots num_splits[i] to num_splits[i + 1] in a buffer of
partial results. There are at most b + num_sm_parts - 1 slots. The zeros of empty sequences are
written by all thread blocks, whatever their partitions.

How the cuts are found. Each sequence occupies an interval on a line: `overhead_blocks` units for
loading its queries and storing its results, then one unit per block; an empty sequence one unit.
The line, of total length T, is cut at the multiples of W = max(ceil(T / num_sm_parts), M), where M
is `min_split_blocks`. A cut that would leave fewer than M blocks of a sequence on one side moves to
that end of the sequence; a cut into the overhead moves to its start. Every quantity is then a
prefix sum or a division, with no serial walk over the batch.

Where all sequences have the same number of blocks, each is cut into the same number of equal
pieces, one per partition, or whole sequences are dealt out, the same number to each partition;
unless that leaves so many partitions without work that the cuts above are better by more than
SPLIT_COST_BLOCKS where sequences stay whole, or EVEN_GAIN_BLOCKS where they do not.

The cost of a partition, its blocks plus `overhead_blocks` per sequence that it touches (1 for an
empty one), is at most W + `overhead_blocks` + max(2 * (M - 1), SPLIT_COST_BLOCKS).

The kernel in `cuda/plan.cu` computes the same numbers, bit for bit.
"""

import jax
import jax.numpy as jnp
from jax import lax

BLOCK_TOKENS = 64
# What a partition gains if no sequence is split: no partial results, and nothing to combine.
SPLIT_COST_BLOCKS = 16
EVEN_GAIN_BLOCKS = 1  # and if equal sequences are split into equal pieces
METADATA_COLUMNS = 8
# The line's length must fit int32; blocks beyond the limit belong to their sequence's last
# partition, so that a plan stays valid, only unbalanced, for absurd lengths.
MAX_LINE = 2**30
ROWS_PER_TILE = 64  # query rows that one thread block computes
NARROW_ROWS = 16  # so many have a kernel of their own (kNarrowRows in cuda/decode.h)


def num_sm_parts(num_q_tokens_per_head_k: int, num_heads_k: int, num_sms: int) -> int:
    """Partitions such that partitions x heads x row tiles fill the SMs once; at least 1."""
    row_tiles = -(-num_q_tokens_per_head_k // ROWS_PER_TILE)
    return max(1, num_sms // (num_heads_k * row_tiles))


def overhead_blocks(num_q_tokens_per_head_k: int, is_fp8_kvcache: bool = False) -> int:
    """Starting and ending a sequence, in units of one block's time: see benchmarks/NOTES.md."""
    if num_q_tokens_per_head_k > NARROW_ROWS:
        return 3
    return 2 if is_fp8_kvcache else 1


def min_split_blocks(num_q_tokens_per_head_k: int) -> int:
    """Shorter splits cost more in the combine, which grows with the query rows, than they gain."""
    return 1 if num_q_tokens_per_head_k <= NARROW_ROWS else 2


def _even_cuts(blocks: jax.Array, batch: jax.Array, parts: int, overhead: int, least: int):
    """Cuts for sequences of `blocks` blocks each.

    Returns the pieces of a sequence, the position of every cut, the split that it starts, and the
    largest cost of a partition.
    """
    per_part = -(-batch // parts)
    pieces = jnp.clip(blocks // least, 1, jnp.maximum(parts // batch, 1))
    size, longer = blocks // pieces, blocks % pieces  # the first `longer` have one block more
    number = jnp.arange(parts + 1, dtype=jnp.int32) * per_part
    seq, split = number // pieces, number % pieces
    block = split * size + jnp.minimum(split, longer)
    done = seq >= batch
    position = jnp.stack([jnp.minimum(seq, batch), jnp.where(done, 0, block)], axis=1)
    cost = per_part * (size + (longer > 0) + overhead)
    return pieces, position, jnp.where(done, 0, split), cost


def plan_reference(
    cache_seqlens: jax.Array, parts: int, overhead: int, least: int
) -> tuple[jax.Array, jax.Array]:
    """Plans one group.

    Args:
      cache_seqlens: `[b]` int32 tokens; negative counts as 0.
      parts: number of partitions.
      overhead: `overhead_blocks`.
      least: `min_split_blocks`.

    Returns:
      `tile_scheduler_metadata [parts, 8]` and `num_splits [b + 1]`, int32.
    """
    zero = jnp.zeros(1, jnp.int32)
    if cache_seqlens.shape[0] == 0:
        return jnp.zeros((parts, METADATA_COLUMNS), jnp.int32), zero
    # An array, since an exported program may not know it yet.
    batch = jnp.asarray(cache_seqlens.shape[0]).astype(jnp.int32)

    lengths = jnp.maximum(cache_seqlens, 0)
    blocks = lengths // BLOCK_TOKENS + (lengths % BLOCK_TOKENS > 0)
    blocks = jnp.minimum(blocks, jnp.maximum(MAX_LINE // batch - overhead, 1))
    extents = jnp.where(blocks > 0, blocks + overhead, 1)
    line = jnp.concatenate([zero, jnp.cumsum(extents, dtype=jnp.int32)])
    starts, total = line[:-1], line[-1]
    part_length = jnp.maximum(-(-total // parts), least)

    # Cuts that stay inside a sequence: those that leave `least` blocks on both sides.
    first = starts + overhead + least
    last = starts + overhead + blocks - least
    cuts_before = (first - 1) // part_length
    inner_cuts = jnp.where(last >= first, last // part_length - cuts_before, 0)
    splits = jnp.where(blocks > 0, inner_cuts + 1, 0)
    num_splits = jnp.concatenate([zero, jnp.cumsum(splits, dtype=jnp.int32)])

    cuts = jnp.arange(parts + 1, dtype=jnp.int32)
    x = cuts * part_length
    # The last sequence that starts at x or before. (searchsorted wants to know the batch.)
    seq = jnp.sum(starts <= x[:, None], axis=1, dtype=jnp.int32) - 1
    block = x - starts[seq] - overhead
    snap = jnp.minimum(least, (blocks[seq] + 1) // 2)
    to_start = (blocks[seq] == 0) | (block < snap)
    inside = ~to_start & (x >= first[seq]) & (x <= last[seq])
    past_end = ~(to_start | inside)
    seq = jnp.where(x >= total, batch, seq + past_end)
    split = jnp.where(inside, cuts - cuts_before[jnp.minimum(seq, batch - 1)], 0)
    position = jnp.stack([seq, jnp.where(inside, block, 0)], axis=1)

    # The same number of blocks in all sequences.
    pieces, even_position, even_split, even_cost = _even_cuts(
        blocks[0], batch, parts, overhead, least
    )
    limit = part_length + overhead + jnp.where(pieces == 1, SPLIT_COST_BLOCKS, EVEN_GAIN_BLOCKS)
    even = jnp.all(blocks == blocks[0]) & (blocks[0] > 0) & (even_cost <= limit)
    position = jnp.where(even, even_position, position)
    split = jnp.where(even, even_split, split)
    even_splits = jnp.arange(num_splits.shape[0], dtype=jnp.int32) * pieces
    num_splits = jnp.where(even, even_splits, num_splits)

    unused = jnp.zeros((parts, 3), jnp.int32)
    metadata = jnp.concatenate([position[:-1], position[1:], split[:-1, None], unused], axis=1)
    return lax.convert_element_type(metadata, jnp.int32), num_splits
