"""DeepSeek-V2, V3 and R1 in JAX, decoding with `jax_flashmla`."""
