"""FlashMLA and FlashInfer in the same process, where PyTorch and they are installed.

They get the same arrays over DLPack: queries, pool, page table and lengths. Their plans are made
before, and calls are timed as ours are, many in one CUDA graph.
"""

import importlib
import importlib.metadata
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.operands import SCALE
from jax_flashmla.arguments import LATENT_DIM, PAGE_BLOCK_SIZE, ROPE_DIM

WORKSPACE_BYTES = 128 * 2**20  # what FlashInfer's documentation recommends


def why_missing(name):
    """Why a peer cannot be imported; None if it can."""
    for module in ("torch", name):
        try:
            importlib.import_module(module)
        except (ImportError, OSError) as error:  # OSError: a library of its own does not load
            return f"{type(error).__name__}: {error}"
    return None


def version(name):
    """Of an installed package, as far as it says."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _tensors(*arrays):
    """PyTorch's views of JAX arrays."""
    import torch

    return [torch.from_dlpack(array) for array in jax.block_until_ready(arrays)]


def to_numpy(tensor):
    """A tensor's values as float32."""
    return tensor.float().cpu().numpy()


def prepare_flash_mla(case, operands):
    """A call of FlashMLA: `out [b, s_q, heads, 512]`, `lse [b, heads, s_q]`.

    https://github.com/deepseek-ai/FlashMLA. Newer versions plan during the first call and keep the
    plan; older ones in `get_mla_metadata`.
    """
    import flash_mla

    q, pool, table, lengths = _tensors(*operands)
    metadata = flash_mla.get_mla_metadata(lengths, case.s_q * case.heads, 1)
    return lambda: flash_mla.flash_mla_with_kvcache(
        q, pool, table, lengths, LATENT_DIM, *metadata, softmax_scale=SCALE, causal=True
    )


def prepare_flashinfer(case, operands):
    """A call of FlashInfer: `out [b * s_q, heads, 512]`, no lse.

    https://docs.flashinfer.ai/api/mla.html.
    """
    import flashinfer
    import torch

    q, pool = _tensors(*operands[:2])
    counts = -(-np.asarray(case.lengths) // PAGE_BLOCK_SIZE)
    table = np.asarray(operands[2])
    ends = np.concatenate([[0], np.cumsum(counts)])
    indices = np.concatenate([row[:count] for row, count in zip(table, counts, strict=True)])
    q_ends = np.arange(case.batch + 1) * case.s_q
    plan = _tensors(*(jnp.asarray(x, jnp.int32) for x in (q_ends, ends, indices, case.lengths)))
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(
        torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    )
    sizes = case.heads, LATENT_DIM, ROPE_DIM, PAGE_BLOCK_SIZE
    wrapper.plan(*plan, *sizes, True, SCALE, q.dtype, pool.dtype)
    q, pool = q.flatten(0, 1), pool[:, :, 0]
    parts = q[..., :LATENT_DIM], q[..., LATENT_DIM:], pool[..., :LATENT_DIM], pool[..., LATENT_DIM:]
    return lambda: (wrapper.run(*parts), None)


PREPARE = {"flash_mla": prepare_flash_mla, "flashinfer": prepare_flashinfer}


def graph_sampler(call, launches, replays):
    """A function that returns microseconds per call, a sample per replay of a CUDA graph."""
    import torch

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            call()

    def sample():
        graph.replay()  # to warm up
        events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        torch.cuda.synchronize()
        return [
            begin.elapsed_time(end) * 1e3 / launches for begin, end in itertools.pairwise(events)
        ]

    return sample
