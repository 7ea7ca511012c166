"""Nothing depends on how strict the user's program is about promotions of ranks and dtypes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

import jax_flashmla as mla
from jax_flashmla import context_parallel
from tests import meshes, problems, support


def decode(q, k_cache, block_table, lengths, k_scale=None, **options):
    plan = mla.get_mla_metadata(lengths, q.shape[-2], 1, num_sms=16)
    operands = q, k_cache, block_table, lengths, 512, *plan
    return mla.flash_mla_with_kvcache(*operands, k_scale=k_scale, **options)


def decode_packed(q, k_cache, block_table, lengths):
    cuts = jnp.asarray([0, 0, 2, 3, 4], jnp.int32)
    packed = q.reshape(-1, *q.shape[2:])[:4]
    return decode(packed, k_cache, block_table, lengths, cu_seqlens_q=cuts, max_seqlen_q=2)


def decode_unpaged(q, k_cache, _, lengths):
    return decode(q, k_cache[:8].reshape(4, 128, 1, 576), None, jnp.minimum(lengths, 128))


def decode_fp8(q, k_cache, block_table, lengths, *, format):
    k_cache = jnp.nan_to_num(k_cache)
    quantized, k_scale = mla.quantize_kv_cache(k_cache, format)
    values = mla.dequantize_kv_cache(quantized, k_scale)
    return values, *decode(q, quantized, block_table, lengths, k_scale)


def append(q, k_cache, block_table, lengths):
    return mla.append_kv_cache(k_cache, q[..., :1, :], block_table, lengths)


def append_packed(q, k_cache, block_table, lengths):
    rows = q[..., :1, :].reshape(-1, 1, 576)
    cuts = jnp.asarray([0, 0, 3, 4, 6], jnp.int32)
    return mla.append_kv_cache(k_cache, rows, block_table, lengths, cu_seqlens_q=cuts)


def merge(*operands):
    out, lse = decode(*operands)
    return mla.merge_attention_states(jnp.stack([out, out]), jnp.stack([lse, lse - 1]))


def table_from_csr(*operands):
    del operands
    return mla.block_table_from_csr(jnp.arange(0, 9, 2), jnp.arange(10), 5)


OPERATIONS = {
    "decode": decode,
    "window": functools.partial(decode, causal=True, sliding_window=70, logits_soft_cap=9.0),
    "packed": decode_packed,
    "unpaged": decode_unpaged,
    "fp8_per_tensor": functools.partial(decode_fp8, format=mla.FP8_PER_TENSOR),
    "fp8_block": functools.partial(decode_fp8, format=mla.FP8_BLOCK),
    "append": append,
    "append_packed": append_packed,
    "merge": merge,
    "csr": table_from_csr,
}


def draw_operands():
    problem = problems.make_problem(np.random.default_rng(), [3, 0, 300, 64], s_q=2)
    return [jnp.asarray(x) for x in problem.arrays]


def assert_same(got, want):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(*(np.asarray(z).view(np.uint8) for z in (x, y)))


class OperationsTest(parameterized.TestCase):
    @parameterized.product(name=tuple(OPERATIONS), jit=(False, True))
    def test_operation(self, name, jit):
        operands = draw_operands()
        fun = jax.jit(OPERATIONS[name]) if jit else OPERATIONS[name]
        want = fun(*operands)
        with support.strict_promotions():
            assert_same(fun(*operands), want)


class MeshesTest(meshes.MeshTest):
    @parameterized.parameters(
        ("decode", ["data"]), ("decode", ["data", None, None, "model"]), ("append", ["data"])
    )
    def test_on_a_mesh(self, name, axes):
        mesh = meshes.make_mesh((4, 2), ("data", "model"))
        pools = [draw_operands() for _ in range(4)]
        operands = [jnp.stack(x) for x in zip(*pools, strict=True)]
        operands = meshes.put(mesh, operands, [axes, *[["data"]] * 3])
        want = jax.jit(OPERATIONS[name])(*operands)
        with support.strict_promotions():
            assert_same(jax.jit(OPERATIONS[name])(*operands), want)

    def test_context_parallel(self):
        mesh = meshes.make_mesh((8,), ("context",))
        *operands, lengths = draw_operands()
        operands.append(jnp.minimum(lengths, 3))

        @functools.partial(
            jax.shard_map, mesh=mesh, in_specs=(P(),) * 4, out_specs=P(), check_vma=False
        )
        def run(q, k_cache, block_table, lengths):
            where = {"axis_name": "context", "split": "interleaved"}
            rows = q[..., :1, :]
            k_cache = context_parallel.append(k_cache, rows, block_table, lengths, **where)
            return context_parallel.decode(q, k_cache, block_table, lengths, causal=True, **where)

        want = jax.jit(run)(*operands)
        with support.strict_promotions():
            assert_same(jax.jit(run)(*operands), want)


if __name__ == "__main__":
    absltest.main()
