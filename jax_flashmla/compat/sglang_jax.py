"""SGLang-JAX's MLA operator: `mla_ragged_paged_attention`.

Signature and semantics after `python/sgl_jax/srt/kernels/mla/v2/kernel.py` of
https://github.com/sgl-project/sglang-jax, commit 02e19414860fc3dc76e6b3d02e45150167dc80a0.
"""

import functools

import jax

from jax_flashmla import arguments
from jax_flashmla.compat import ragged_paged
from jax_flashmla.ragged import block_table_from_csr


@functools.partial(
    jax.jit,
    static_argnames=(
        *("sm_scale", "sliding_window", "soft_cap", "mask_value", "q_scale", "k_scale", "v_scale"),
        *("chunk_prefill_size", "num_kv_pages_per_block", "num_queries_per_block"),
        *("vmem_limit_bytes", "decode_batch_size", "mixed_static_q_len", "debug_mode"),
    ),
    donate_argnames=("cache_kv",),
)
def mla_ragged_paged_attention(
    ql_nope: jax.Array,
    q_pe: jax.Array,
    new_kv_c: jax.Array,
    new_k_pe: jax.Array,
    cache_kv: jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    cu_kv_lens: jax.Array,
    distribution: jax.Array,
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = None,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    chunk_prefill_size: int | None = None,
    num_kv_pages_per_block: tuple[int, int, int] | int | None = None,
    num_queries_per_block: tuple[int, int, int] | int | None = None,
    vmem_limit_bytes: int | None = None,
    decode_batch_size: int = 1,
    mixed_static_q_len: int | None = None,
    debug_mode: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Appends the new tokens to the cache, which is donated, and attends to it.

    Operands, results, and arguments that are not named here: `jax_flashmla.compat.ragged_paged`.

    * `page_indices [num_page_indices]` lists pages without gaps: those of sequence `i` begin at
      `page_indices[cu_kv_lens[i] / page_size]`.
    * `cu_kv_lens [n + 1]` int32 sums the lengths, each rounded up to whole pages.
    * `mixed_static_q_len` bounds the new tokens of a sequence. With it, as where drafted tokens are
      verified, the tokens of a sequence share its reads of the cache; those before the last so many
      get 0.
    * `chunk_prefill_size`, `num_kv_pages_per_block`, `num_queries_per_block`, `vmem_limit_bytes`
      and `decode_batch_size` tune the TPU kernel, and are ignored.

    Raises:
      TypeError, ValueError: an argument has the wrong type, dtype, shape or value.
    """
    del chunk_prefill_size, num_kv_pages_per_block, num_queries_per_block, vmem_limit_bytes
    del decode_batch_size
    if mixed_static_q_len is not None:
        arguments.positive_int("mixed_static_q_len", mixed_static_q_len)
    operands = ql_nope, q_pe, new_kv_c, new_k_pe, cache_kv, kv_lens
    *operands, page_indices, cu_q_lens, distribution = ragged_paged.check_operands(
        *operands, page_indices, cu_q_lens, distribution
    )
    cu_kv_lens = arguments.int32_array("cu_kv_lens", cu_kv_lens)
    arguments.shape("cu_kv_lens", cu_kv_lens, cu_q_lens.shape, "as cu_q_lens's")
    pages, words, packing, _ = cache_kv.shape
    block_table = block_table_from_csr(
        cu_kv_lens // (words * packing),
        page_indices,
        max(1, min(pages, page_indices.shape[0])),  # as many as a sequence can have
    )
    return ragged_paged.append_and_attend(
        *operands,
        block_table,
        cu_q_lens,
        distribution,
        sm_scale=sm_scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        mask_value=mask_value,
        q_scale=q_scale,
        k_scale=k_scale,
        v_scale=v_scale,
        debug_mode=debug_mode,
        max_seqlen_q=mixed_static_q_len,
    )
