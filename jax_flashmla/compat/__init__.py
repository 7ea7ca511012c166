"""MLA operators of other JAX projects, with their names and arguments, on top of this library.

A program that calls one of them on TPUs calls this library on GPUs by changing an import:

* `jax_flashmla.compat.sglang_jax.mla_ragged_paged_attention`
* `jax_flashmla.compat.tpu_inference.mla_ragged_paged_attention`
* `jax_flashmla.compat.tokamax.MultiHeadLatentAttention`

All three are one operation: the new tokens' rows are appended to a paged cache, then every new
token attends to its sequence up to itself. They differ in how pages are listed, and in arguments
that tune a TPU kernel, which are taken and ignored. What cannot be done is refused while tracing.
`jax_flashmla.compat.ragged_paged` describes the operands. No code of these projects is used, and
none of them needs to be installed.
"""
