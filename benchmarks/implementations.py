"""The implementations that `benchmarks.decode` compares: their outputs, and how each is timed.

Each `prepare_*(case, operands)` returns `(outputs, samplers)`: `(out, lse)`, whose lse may be None,
and by the key of the report a function that measures once more and returns microseconds.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.operands import SCALE
from benchmarks.timing import REPLAYS, time_kernels, time_wall
from jax_flashmla import flash_mla_with_kvcache, get_mla_metadata, native, planner

# The time of each implementation in a row: ours first, then what it is compared with.
KEYS = {
    "cuda": "decode_us",
    "xla": "xla_us",
    "plain": "plain_xla_us",
    "flash_mla": "flash_mla_here_us",
    "flashinfer": "flashinfer_here_us",
}
GRAPH_MICROSECONDS = 10_000  # about as long as one graph should run
WALL_CALLS = 10  # in flight
WALL_SAMPLES = 3  # a round
# The plain version gathers what the table holds; above this it is not worth the memory.
PLAIN_BYTES = 8 * 2**30


def plain_decode(q, k_cache, block_table, cache_seqlens):
    """What one writes first: gather all pages of the table, then two einsums and a softmax."""
    batch = q.shape[0]
    keys = k_cache[block_table].reshape(batch, -1, 576)
    scores = jnp.einsum("bshd,btd->bsht", q, keys, preferred_element_type=jnp.float32) * SCALE
    valid = jnp.arange(keys.shape[1]) < cache_seqlens[:, None]
    weights = jax.nn.softmax(jnp.where(valid[:, None, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum(
        "bsht,btv->bshv",
        weights.astype(q.dtype),
        keys[..., :512],
        preferred_element_type=jnp.float32,
    )
    return out.astype(q.dtype)


def decode_layers(queries, k_cache, block_table, cache_seqlens):
    """Decodes of all queries through the kernel, with one plan, as a model's step has them.

    `cache_seqlens` may be a list, with the lengths of each decode: every decode then plans.
    """
    shared = not isinstance(cache_seqlens, list)
    lengths = [cache_seqlens] * len(queries) if shared else cache_seqlens
    _, s_q, heads, _ = queries[0].shape
    plan = get_mla_metadata(cache_seqlens, s_q * heads, 1) if shared else (None, None)
    return [
        flash_mla_with_kvcache(
            *(q, k_cache, block_table, lengths[i], 512, *plan), causal=True, implementation="cuda"
        )[0]
        for i, q in enumerate(queries)
    ]


def launches_for(case):
    """How many decodes make a graph of some 10 ms. Only the precision depends on it."""
    microseconds = 10 + max(case.read_bytes / 4.5e6, case.flops / 600e6)
    return int(np.clip(GRAPH_MICROSECONDS / microseconds, 4, 200))


def prepare_cuda(case, operands, parts=True):
    """The library's kernels; with `parts`, the split and the combine kernel apart as well."""
    rows = case.s_q * case.heads
    metadata = get_mla_metadata(operands[3], rows, 1)
    outputs = flash_mla_with_kvcache(*operands, 512, *metadata, causal=True, implementation="cuda")
    kernels = functools.partial(time_kernels, operands, metadata, launches=launches_for(case))
    kinds = ("split", "combine", "decode") if parts else ("decode",)
    samplers = {f"{kind}_us": functools.partial(kernels, kind) for kind in kinds}
    if rows <= planner.ROWS_PER_TILE:
        samplers["floor_us"] = functools.partial(kernels, "floor")
    return outputs, samplers


def wall(program, *args):
    """A round's samples of a compiled program's wall time."""
    return [time_wall(program, *args, calls=WALL_CALLS) for _ in range(WALL_SAMPLES)]


def prepare_xla(case, operands):
    """The library held to its XLA implementation."""
    decode = functools.partial(flash_mla_with_kvcache, causal=True, implementation="xla")
    program = jax.jit(decode).lower(*operands).compile()
    return program(*operands), {KEYS["xla"]: functools.partial(wall, program, *operands)}


def prepare_plain(case, operands):
    """Gather and einsum through XLA."""
    program = jax.jit(plain_decode).lower(*operands).compile()
    sampler = functools.partial(wall, program, *operands)
    return (program(*operands), None), {KEYS["plain"]: sampler}


def prepare_peer(name, case, operands):
    """FlashMLA or FlashInfer."""
    call = peers.PREPARE[name](case, operands)
    out, lse = call()
    outputs = (
        peers.to_numpy(out).reshape(case.batch, case.s_q, case.heads, 512),
        (None if lse is None else peers.to_numpy(lse)),
    )
    sample = peers.graph_sampler(call, launches_for(case), REPLAYS)
    return outputs, {KEYS[name]: sample}


def prepare(name, case, operands, parts):
    """Outputs and samplers of an implementation; None where it does not fit the case."""
    if name == "cuda":
        return prepare_cuda(case, operands, parts)
    if name == "xla":
        return prepare_xla(case, operands)
    if name == "plain":
        gathered = case.batch * max(case.lengths) * 576 * 2
        # It knows no causal mask.
        fits = case.s_q == 1 and gathered <= PLAIN_BYTES
        return prepare_plain(case, operands) if fits else None
    return prepare_peer(name, case, operands)


def why_not(name):
    """Why an implementation cannot run here; None if it can."""
    if name == "cuda":
        return native.why_no_kernel("decode")
    if name in peers.PREPARE:
        return peers.why_missing(name)
    return None


def timing(name):
    """How an implementation's time is taken, in words."""
    if name in ("xla", "plain"):
        return f"wall time of a jitted call, {WALL_CALLS} in flight"
    return "many launches in one CUDA graph, per launch"
