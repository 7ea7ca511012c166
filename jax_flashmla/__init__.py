"""Paged multi-head latent attention (MLA) decode for JAX."""

from jax_flashmla import context_parallel
from jax_flashmla.cache import append_kv_cache
from jax_flashmla.cache_formats import FP8_BLOCK, FP8_PER_TENSOR
from jax_flashmla.config import show_config
from jax_flashmla.decode import flash_mla_with_kvcache
from jax_flashmla.merge import merge_attention_states
from jax_flashmla.metadata import MLAMetadata, get_mla_metadata
from jax_flashmla.quantization import dequantize_kv_cache, quantize_kv_cache
from jax_flashmla.ragged import block_table_from_csr
from jax_flashmla.version import __version__

__all__ = [
    "FP8_BLOCK",
    "FP8_PER_TENSOR",
    "MLAMetadata",
    "__version__",
    "append_kv_cache",
    "block_table_from_csr",
    "context_parallel",
    "dequantize_kv_cache",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
    "merge_attention_states",
    "quantize_kv_cache",
    "show_config",
]
