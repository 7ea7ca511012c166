"""The MLA operator of vLLM's tpu-inference: `mla_ragged_paged_attention`.

Signature and semantics after `tpu_inference/kernels/mla/v1/kernel.py` of
https://github.com/vllm-project/tpu-inference, commit 1dbf5d0cc82f765140a96d2480c70212ae2b4551. The
`v2` kernel's arguments are taken as well, which only tune it. Its later revisions have `ql_nope`
and the output as `[h_q, T, 512]`: transpose both.
"""

import functools

import jax
import jax.numpy as jnp

from jax_flashmla.compat import ragged_paged


@functools.partial(
    jax.jit,
    static_argnames=(
        *("sm_scale", "sliding_window", "soft_cap", "mask_value", "q_scale", "k_scale", "v_scale"),
        *("chunk_prefill_size", "num_kv_pages_per_block", "num_queries_per_block"),
        *("vmem_limit_bytes", "decode_batch_size", "s_dtype", "p_same_dtype_as_v", "debug_mode"),
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
    s_dtype: jnp.dtype = jnp.bfloat16,
    p_same_dtype_as_v: bool = True,
    debug_mode: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Appends the new tokens to the cache, which is donated, and attends to it.

    Operands, results, and arguments that are not named here: `jax_flashmla.compat.ragged_paged`.

    * `page_indices [n * pages_per_seq]` lists pages, as many entries for each sequence.
    * `chunk_prefill_size`, `num_kv_pages_per_block`, `num_queries_per_block`, `vmem_limit_bytes`
      and `decode_batch_size` tune the TPU kernel, `s_dtype` and `p_same_dtype_as_v` say what it
      rounds: all are ignored. Scores are float32 here.

    Raises:
      TypeError, ValueError: an argument has the wrong type, dtype, shape or value.
    """
    del chunk_prefill_size, num_kv_pages_per_block, num_queries_per_block, vmem_limit_bytes
    del decode_batch_size, s_dtype, p_same_dtype_as_v
    operands = ql_nope, q_pe, new_kv_c, new_k_pe, cache_kv, kv_lens
    *operands, page_indices, cu_q_lens, distribution = ragged_paged.check_operands(
        *operands, page_indices, cu_q_lens, distribution
    )
    return ragged_paged.append_and_attend(
        *operands,
        ragged_paged.table_of_equal_rows(page_indices, operands[-1]),
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
    )
