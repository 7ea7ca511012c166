"""`flash_mla_with_kvcache`: variable-length MLA decode, paged or not, as a JAX primitive."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jax_flashmla import arguments, cache_layout, native, partition, ragged
from jax_flashmla.arguments import HEAD_DIM, LATENT_DIM
from jax_flashmla.cache_formats import FP8_FORMATS, format_of
from jax_flashmla.decode_local import DecodeConfig, decode_abstract, decode_local_p, result_types
from jax_flashmla.primitive import define_primitive, lower_on_mesh, needs_devices
from jax_flashmla.promotion import own_promotions


@own_promotions
def flash_mla_with_kvcache(
    q: jax.Array | tuple[jax.Array, jax.Array],
    k_cache: jax.Array,
    block_table: jax.Array | None,
    cache_seqlens: jax.Array,
    head_dim_v: int = LATENT_DIM,
    tile_scheduler_metadata: jax.Array | None = None,
    num_splits: jax.Array | None = None,
    *,
    k_scale: jax.Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    cu_seqlens_q: jax.Array | None = None,
    max_seqlen_q: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends with absorbed queries to a latent cache, paged or not (multi-head latent attention).

    Each cache row is a key of 576 columns, 512 latent and 64 rotary; its first 512 columns are also
    the value (DeepSeek-V2, arXiv 2405.04434). Nothing past a sequence's length is ever used: page
    tails, unnamed pages and table entries there may hold anything, NaN included.

    `*G` stands for any number of leading group axes, the same on all operands (usually none): one
    independent page pool per group, with page ids local to it.

    Args:
      q: `[*G, b, s_q, h_q, 576]` bfloat16 or float16, or a pair `(q_nope [.., 512],
        q_rope [.., 64])`, which spares a concatenation. With `cu_seqlens_q`, packed:
        `[*G, total, h_q, 576]`, or such a pair.
      k_cache: dtype of `q`, or an FP8 cache (`jax_flashmla.cache_formats`): float8_e4m3fn, with a
        `k_scale`, or uint8. Paged: `[*G, num_blocks, page_block_size, h_kv, width]`, with pages of
        1, 16, 32, 64, 128, 256, 512 or 1024 tokens. Unpaged: `[*G, b, max_len, h_kv, width]`, any
        `max_len`. `width` is 576 (uint8: 656) or more, a multiple of 8 (FP8: of 16): columns past
        these are never read. A cache whose pages are packed,
        `[num_blocks, page_block_size / 2, 2, width]`, is given as
        `k_cache.reshape(num_blocks, page_block_size, 1, width)`, which costs nothing.
      block_table: `[*G, b, max_blocks]` int32, the page ids of each sequence, in order. An id
        outside the pool reads as zeros. `None`: the cache is unpaged.
      cache_seqlens: `[*G, b]` int32, the valid tokens of each sequence, the new ones included;
        clamped to what the table, or `max_len`, holds.
      head_dim_v: columns of the value, 512.
      tile_scheduler_metadata: `[*G, num_sm_parts, 8]` int32 and
      num_splits: `[*G, b + 1]` int32, from `get_mla_metadata`. Both `None`: plan inside the call.
      k_scale: `[*G]` float32, the scale of a float8_e4m3fn cache, and of no other.
      softmax_scale: default `576 ** -0.5`.
      causal: query `i` of `s_q` sees the keys up to `cache_seqlens - s_q + i`.
      sliding_window: of the keys that a query may see, it sees the last so many. Pages that no
        query sees are not read. Plan with the same: `get_mla_metadata(.., sliding_window=..)`.
      logits_soft_cap: scaled scores `s` become `cap * tanh(s / cap)`, as in Gemma 2 (arXiv
        2408.00118). In the CUDA kernels they are good to some 2**-22 of the cap: `None`, not a huge
        number, means no cap.
      cu_seqlens_q: `[*G, b + 1]` int32: the queries of sequence `i` are `cu_seqlens_q[i]` to
        `cu_seqlens_q[i + 1]` of the packed ones, and the last tokens of the sequence; none, one or
        more. A sequence without queries is not read. Entries are clamped to `[0, total]`.
      max_seqlen_q: queries that a sequence has at most (static), with `cu_seqlens_q`. It takes the
        place of `s_q` in what the call costs and in what `get_mla_metadata` is told.
      implementation: `"cuda"`, `"xla"`, or `None` for the faster one that runs here.

    Returns:
      out `[*G, b, s_q, h_q, 512]` in q's dtype, and lse `[*G, b, h_q, s_q]` float32, the natural
      logarithm of the sum of `exp(softmax_scale * q @ k)` (or of capped scores). A query that sees
      no key gives `out` 0 and `lse` -inf (FlashMLA: +inf). Of packed queries, out
      `[*G, total, h_q, 512]` and lse `[*G, h_q, total]`; one that is no sequence's, or is followed
      by `max_seqlen_q` or more of its sequence, gives 0 and -inf.

    Raises:
      TypeError, ValueError: an argument has the wrong type, dtype, rank, shape or value.
      RuntimeError: `implementation="cuda"` where the kernel cannot run; the message says why.
      NotImplementedError: under `jax.grad` or `jax.jvp`; decode has no derivative.

    Example:
      Two sequences, of 100 and 3 tokens, in pages of one pool:

      >>> q = jnp.ones((2, 1, 16, 576), jnp.bfloat16)
      >>> k_cache = jnp.ones((5, 64, 1, 576), jnp.bfloat16)
      >>> block_table = jnp.array([[4, 0], [2, -1]], jnp.int32)
      >>> cache_seqlens = jnp.array([100, 3], jnp.int32)
      >>> out, lse = jax.jit(flash_mla_with_kvcache)(q, k_cache, block_table, cache_seqlens)
      >>> out.shape, lse.shape
      ((2, 1, 16, 512), (2, 16, 1))

      The same from an unpaged cache, with room for 160 tokens each:

      >>> k_cache = jnp.ones((2, 160, 1, 576), jnp.bfloat16)
      >>> out, lse = jax.jit(flash_mla_with_kvcache)(q, k_cache, None, cache_seqlens)
      >>> out.shape, lse.shape
      ((2, 1, 16, 512), (2, 16, 1))

      Packed queries, three of the first sequence and one of the second:

      >>> q, cuts = jnp.ones((4, 16, 576), jnp.bfloat16), jnp.array([0, 3, 4], jnp.int32)
      >>> out, lse = flash_mla_with_kvcache(
      ...     q, k_cache, None, cache_seqlens, causal=True, cu_seqlens_q=cuts, max_seqlen_q=3
      ... )
      >>> out.shape, lse.shape
      ((4, 16, 512), (16, 4))
    """
    packed = cu_seqlens_q is not None or max_seqlen_q is not None
    if packed:
        q, has_query, tokens = ragged.pad_queries(q, cu_seqlens_q, max_seqlen_q)
    whose = "cu_seqlens_q's" if packed else "q's"  # the batch, in messages
    q_parts, split_q = arguments.queries(q)
    *groups, batch, s_q, h_q, _ = q_parts[0].shape

    k_cache = arguments.array("k_cache", k_cache)
    kind = format_of(k_cache)
    if kind not in FP8_FORMATS and k_cache.dtype != q_parts[0].dtype:
        raise TypeError(f"k_cache: expected q's dtype {q_parts[0].dtype}, got {k_cache.dtype}")
    paged = block_table is not None
    fixed = ([f"group axes {groups}"] if groups else []) + ([] if paged else ["b"])
    given = f"{' and '.join(fixed)} as {whose}" if fixed else ""
    cache_layout.check_cache(k_cache, groups, paged, batch, given)
    k_scale = cache_layout.check_scale("k_scale", k_scale, kind, groups, "group axes as q's")
    h_kv = k_cache.shape[-2]
    if paged and k_cache.shape[len(groups)] == 0:
        raise ValueError("k_cache: expected at least one page, got num_blocks 0")
    if h_kv == 0 or h_q == 0 or h_q % h_kv:
        raise ValueError(
            f"q: expected h_q a positive multiple of k_cache's h_kv, got h_q {h_q} and h_kv {h_kv}"
        )

    block_table, cache_seqlens = arguments.table_and_lengths(
        block_table, cache_seqlens, groups, batch, f"b as {whose}"
    )
    if paged:
        arguments.room(block_table, k_cache.shape[-3])
    if packed:
        cache_seqlens = jnp.where(has_query, cache_seqlens, 0)
    if arguments.static_int("head_dim_v", head_dim_v) != LATENT_DIM:
        raise ValueError(f"head_dim_v: expected {LATENT_DIM}, got {head_dim_v}")

    metadata = arguments.plan(tile_scheduler_metadata, num_splits, groups, batch)
    if softmax_scale is None:
        softmax_scale = HEAD_DIM**-0.5
    if sliding_window is not None:
        sliding_window = arguments.window("sliding_window", sliding_window)
    if logits_soft_cap is not None:
        logits_soft_cap = arguments.static_finite_float("logits_soft_cap", logits_soft_cap)
        if logits_soft_cap <= 0:
            raise ValueError(f"logits_soft_cap: expected a positive number, got {logits_soft_cap}")
        # Beyond, nothing is seen of the cap, or of the scores, and float32 has no room for either.
        logits_soft_cap = min(max(logits_soft_cap, 2.0**-100), 2.0**100)
    native.check_implementation("decode", implementation)
    config = DecodeConfig(
        softmax_scale=arguments.static_finite_float("softmax_scale", softmax_scale),
        causal=arguments.static_bool("causal", causal) and s_q > 1,
        sliding_window=sliding_window,
        logits_soft_cap=logits_soft_cap,
        split_q=split_q,
        scaled=k_scale is not None,
        paged=paged,
        planned=bool(metadata),
        implementation=implementation,
    )
    rest = k_cache, k_scale, block_table, cache_seqlens
    out, lse = _bind(*q_parts, *rest, *metadata, config=config)
    return ragged.pack_results(out, lse, tokens) if packed else (out, lse)


def _bind(*operands, config):
    operands = [x for x in operands if x is not None]
    return decode_p.bind(*operands, config=config, devices=needs_devices())


def _decode(*operands, config):
    """Lowers the outer primitive: any number of group axes become one, and all caches paged."""
    q, (k_cache, k_scale, block_table, cache_seqlens), metadata = config.split_operands(operands)
    groups = cache_seqlens.shape[:-1]
    if 0 in cache_seqlens.shape:  # no sequence, and an unpaged cache without a page
        return tuple(jnp.zeros(*result) for result in result_types(q[0]))
    if not config.paged:
        block_table = cache_layout.table_of_sequences(k_cache)
        operands = *q, k_cache, k_scale, block_table, cache_seqlens, *metadata
        operands = [x for x in operands if x is not None]
        config = dataclasses.replace(config, paged=True)
    operands = [x.reshape(math.prod(groups), *x.shape[len(groups) :]) for x in operands]
    results = decode_local_p.bind(*operands, config=config)
    return tuple(result.reshape(*groups, *result.shape[1:]) for result in results)


def _decode_lowering(ctx, *operands, config, devices):
    """Devices share groups, batch and heads.

    A device plans for its part itself, unless it has whole groups: the plan is then divided as they
    are.
    """
    del devices
    q, (k_cache, *_), metadata = config.split_operands(ctx.avals_in)
    one_kv_head = k_cache.shape[-2] == 1

    def divide(specs):
        *groups, batch, _, heads, _ = specs[0]
        kv_heads = specs[len(q)][-2]
        heads = heads if one_kv_head else kv_heads
        specs = partition.divide(groups, batch, heads, kv_heads, config.paged)

        def part(*operands):
            if specs.whole_groups:
                return _decode(*operands, config=config)
            operands = operands[: len(operands) - len(metadata)]
            return _decode(*operands, config=dataclasses.replace(config, planned=False))

        scale = [specs.k_scale] if config.scaled else []
        table = [specs.block_table] if config.paged else []
        rest = specs.k_cache, *scale, *table, specs.cache_seqlens
        in_specs = (*[specs.q] * len(q), *rest, *[specs.metadata] * len(metadata))
        return part, in_specs, (specs.out, specs.lse)

    rule = partition.decode_rule(
        k_cache.ndim - 4, len(q), config.scaled, config.paged, config.planned, one_kv_head
    )
    return lower_on_mesh(ctx, operands, functools.partial(_decode, config=config), rule, divide)


def _batcher(operands, dims, *, config, devices):
    """Never touches the rows of the cache.

    Cache mapped: the mapped axis becomes one more group axis, where it stands if it is among them.
    Cache not mapped: it is folded into the batch, with the page table that an unpaged cache then
    needs, and the metadata, which was planned for the batch of one example, is dropped. A scale of
    each example for a cache that they share is of no use but possible: they are computed in turn.
    """
    del devices
    q, (k_cache, k_scale, block_table, cache_seqlens), metadata = config.split_operands(operands)
    q_dims, (k_dim, scale_dim, table_dim, lengths_dim), metadata_dims = config.split_operands(dims)
    if k_dim is None and scale_dim is not None:
        return _in_turn(operands, dims, config), [0, 0]
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    mesh_axes = partition.mapped_axes(operands, dims)

    def to_axis(x, dim, axis):
        if x is None:
            return None
        if dim is None:
            return partition.repeat(x, axis, size, mesh_axes)
        return jnp.moveaxis(x, dim, axis)

    if k_dim is not None:
        axis = k_dim if k_dim <= k_cache.ndim - 5 else 0
        # Metadata shared by all examples is a plan for lengths shared by all.
        keep = all(dim is not None for dim in metadata_dims) or lengths_dim is None
        kept = zip(metadata, metadata_dims, strict=True) if keep else ()
        outs = _bind(
            *(to_axis(x, dim, axis) for x, dim in zip(q, q_dims, strict=True)),
            jnp.moveaxis(k_cache, k_dim, axis),
            to_axis(k_scale, scale_dim, axis),
            to_axis(block_table, table_dim, axis),
            to_axis(cache_seqlens, lengths_dim, axis),
            *(to_axis(x, dim, axis) for x, dim in kept),
            config=dataclasses.replace(config, planned=config.planned and keep),
        )
        return outs, [axis, axis]

    if not config.paged:
        block_table = cache_layout.table_of_sequences(k_cache)
    batch_axis = k_cache.ndim - 4  # it follows the group axes
    q = [to_axis(x, dim, batch_axis) for x, dim in zip(q, q_dims, strict=True)]
    # Of two axes that become one, a mesh can divide the first, or both.
    q_spec = partition.spec_of(jax.typeof(q[0]))[batch_axis:]
    batch_first = q_spec[0] is None and q_spec[1] is not None

    def fold(x):
        if batch_first:
            x = jnp.swapaxes(x, batch_axis, batch_axis + 1)
        batch = x.shape[batch_axis] * x.shape[batch_axis + 1]
        return x.reshape(*x.shape[:batch_axis], batch, *x.shape[batch_axis + 2 :])

    outs = _bind(
        *map(fold, q),
        k_cache,
        k_scale,
        fold(to_axis(block_table, table_dim, batch_axis)),
        fold(to_axis(cache_seqlens, lengths_dim, batch_axis)),
        config=dataclasses.replace(config, paged=True, planned=False),
    )
    example_lengths = [n for i, n in enumerate(cache_seqlens.shape) if i != lengths_dim]
    batch = example_lengths[-1]
    parts = (batch, size) if batch_first else (size, batch)
    outs = [x.reshape(*x.shape[:batch_axis], *parts, *x.shape[batch_axis + 1 :]) for x in outs]
    return outs, [batch_axis + batch_first] * 2


def _in_turn(operands, dims, config):
    """One example after the other."""

    def example(mapped):
        mapped = iter(mapped)
        own = (x if d is None else next(mapped) for x, d in zip(operands, dims, strict=True))
        return _bind(*own, config=config)

    mapped = [jnp.moveaxis(x, d, 0) for x, d in zip(operands, dims, strict=True) if d is not None]
    return lax.map(example, mapped)


decode_p = define_primitive(
    "mla_decode", abstract=decode_abstract, lowering=_decode_lowering, batcher=_batcher
)
