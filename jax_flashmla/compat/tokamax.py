"""Tokamax's MLA operator: `MultiHeadLatentAttention`.

Signature and semantics after `tokamax/_src/ops/experimental/mla/base.py` of
https://github.com/openxla/tokamax, commit 156d1d8756eed4ec3576514769e3b90fb36eb325, where it is
experimental and not exported. Its `v3` kernel, whose cache has tokens as columns, is not this
operator.
"""

import jax
import jax.numpy as jnp

from jax_flashmla.compat import ragged_paged


class MultiHeadLatentAttention:
    """Appends new tokens to a paged cache and attends to it, when called; it has no state."""

    def __call__(
        self,
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
        s_dtype: jax.typing.DTypeLike = jnp.bfloat16,
        debug_mode: bool = False,
        return_residuals: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """Appends and attends.

        Operands, results, and arguments not named here: `jax_flashmla.compat.ragged_paged`. The
        output has the dtype of `ql_nope`, as from tokamax's TPU kernel. Donate `cache_kv` to
        `jax.jit`, or it is copied.

        * `page_indices [n * pages_per_seq]` lists pages, as many entries for each sequence.
        * `s_dtype`, the dtype of scores, is ignored: it is float32 here.
        * `return_residuals`: only `False`.

        Raises:
          TypeError, ValueError: an argument has the wrong type, dtype, shape or value.
        """
        del s_dtype
        if return_residuals:
            raise ValueError("return_residuals: expected False, got True: there are none")
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
