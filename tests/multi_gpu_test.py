"""The CUDA kernels on all GPUs of a host: each of the ways to share a decode between them.

`sharding_test.py` and `context_parallel_test.py` have the same ways in more variants, on CPUs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_flashmla import (
    append_kv_cache,
    context_parallel,
    flash_mla_with_kvcache,
    get_mla_metadata,
)
from tests import problems, support
from tests.meshes import collectives, put

SCALE = 576**-0.5
AXIS_TYPES = AxisType.Auto, AxisType.Explicit


@functools.partial(jax.jit, static_argnames="planned")
def decode(q, *rest, planned=False):
    metadata = ()
    if planned:
        metadata = get_mla_metadata(rest[-1], q.shape[-3] * q.shape[-2], 1)
    return flash_mla_with_kvcache(q, *rest, 512, *metadata, causal=True, implementation="cuda")


class MultiGpuTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        support.need_kernel(self, "decode")
        self.gpus = jax.devices("gpu")
        if len(self.gpus) < 2:
            self.skipTest("needs two GPUs")
        self.rng = np.random.default_rng()

    def mesh(self, axis_type=AxisType.Auto):
        count = len(self.gpus)
        return jax.make_mesh((count,), ("x",), axis_types=(axis_type,), devices=self.gpus)

    def check(self, got, arrays, causal=True):
        arrays = [jnp.asarray(x) for x in arrays]
        dtype = arrays[0].dtype
        want = support.decode_in_low_precision(arrays, SCALE, causal, weights_dtype=jnp.float32)
        plain = support.decode_in_low_precision(arrays, SCALE, causal)
        got = [np.asarray(x) for x in got]
        support.assert_decodes_well(self, got, [np.asarray(x) for x in want], plain, dtype)

    @parameterized.product(axis_type=AXIS_TYPES, what=("heads", "batch"), planned=(False, True))
    def test_one_pool(self, axis_type, what, planned):
        lengths = self.rng.integers(0, 3000, 4 * len(self.gpus))
        problem = problems.make_problem(self.rng, lengths, s_q=2, h_q=128)
        specs = {
            "heads": ((None, None, "x"), (), (), ()),
            "batch": (("x",), (), ("x",), ("x",)),
        }[what]
        mesh = self.mesh(axis_type)
        operands = put(mesh, problem.arrays, specs)
        with jax.set_mesh(mesh):
            self.assertEqual(collectives(decode.lower(*operands, planned=planned).compile()), [])
            got = decode(*operands, planned=planned)
        self.assertTrue(got[0].sharding.is_equivalent_to(operands[0].sharding, 4))
        self.check(got, problem.arrays)

    @parameterized.parameters(*AXIS_TYPES)
    def test_an_unpaged_cache(self, axis_type):
        lengths = self.rng.integers(0, 2049, 4 * len(self.gpus))
        problem = problems.make_unpaged_problem(self.rng, lengths, 2048, s_q=2, h_q=128, width=640)
        arrays = problem.q, problem.k_cache, problem.cache_seqlens
        mesh = self.mesh(axis_type)
        q, k_cache, lengths = put(mesh, arrays, [("x",)] * 3)
        with jax.set_mesh(mesh):
            compiled = decode.lower(q, k_cache, None, lengths, planned=True).compile()
            got = decode(q, k_cache, None, lengths, planned=True)
        self.assertEqual(collectives(compiled), [])
        # Each decodes its part of the cache where it lies.
        memory = compiled.memory_analysis()
        self.assertLess(memory.argument_size_in_bytes, 2 * problem.k_cache.nbytes / len(self.gpus))
        self.check(got, problem.arrays)

    @parameterized.parameters(*AXIS_TYPES)
    def test_a_pool_each(self, axis_type):
        count = len(self.gpus)
        parts = [
            problems.make_problem(self.rng, self.rng.permutation([3, 1, 2000, 64]), h_q=16)
            for _ in range(count)
        ]
        grouped = problems.stack(parts)
        new_kv = self.rng.standard_normal((count, 4, 1, 1, 576)).astype(jnp.bfloat16)
        mesh = self.mesh(axis_type)
        operands = put(mesh, (*grouped.arrays, new_kv), [("x",)] * 5)

        @functools.partial(jax.jit, donate_argnums=1)
        def step(q, k_cache, table, lengths, new_kv):
            k_cache = append_kv_cache(k_cache, new_kv, table, lengths)
            return k_cache, *decode(q, k_cache, table, lengths)

        with jax.set_mesh(mesh):
            compiled = step.lower(*operands).compile()
            k_cache, *got = (np.asarray(x) for x in step(*operands))
        self.assertEqual(collectives(compiled), [])
        # In place, with no copy of the pool.
        memory = compiled.memory_analysis()
        pool = grouped.k_cache.nbytes // count
        self.assertEqual(memory.alias_size_in_bytes, pool)
        self.assertLess(memory.output_size_in_bytes - memory.alias_size_in_bytes, pool // 4)
        for i, part in enumerate(parts):
            rows = append_kv_cache(part.k_cache, new_kv[i], part.block_table, part.cache_seqlens)
            support.assert_same_bits(k_cache[i], rows)
            self.check(
                [x[i] for x in got], (part.q, k_cache[i], part.block_table, part.cache_seqlens)
            )

    @parameterized.product(split=context_parallel.SPLITS, s_q=(1, 2))
    def test_one_long_sequence(self, split, s_q):
        count, length = len(self.gpus), 131_072 - 3
        blocks = 131_072 // 64 // count
        keys = jax.random.normal(jax.random.key(0), (131_072 // 64, 64, 1, 576), jnp.bfloat16)
        q = self.rng.standard_normal((1, s_q, 16, 576)).astype(jnp.bfloat16)
        lengths = np.array([length], np.int32)
        spread = np.arange(count * blocks).reshape(
            (count, blocks) if split == "contiguous" else (blocks, count)
        )
        spread = spread if split == "contiguous" else spread.T
        table = np.arange(blocks, dtype=np.int32)[None]
        mesh = self.mesh()

        @jax.jit
        @functools.partial(
            jax.shard_map, mesh=mesh, in_specs=(P(), P("x"), P(), P()), out_specs=(P(), P())
        )
        def run(q, pools, table, lengths):
            return context_parallel.decode(
                q,
                pools[0],
                table,
                lengths,
                axis_name="x",
                split=split,
                causal=True,
                implementation="cuda",
            )

        pools = jax.device_put(np.asarray(keys)[spread], jax.NamedSharding(mesh, P("x")))
        got = run(q, pools, table, lengths)
        whole = np.arange(count * blocks, dtype=np.int32)[None]
        self.check(got, (q, keys, whole, lengths))

    def test_a_device_that_is_not_the_first(self):
        problem = problems.make_problem(self.rng, [0, 65, 1000], h_q=9)
        operands = jax.device_put(problem.arrays, self.gpus[-1])
        got = decode(*operands)
        self.assertEqual(got[0].devices(), {self.gpus[-1]})
        self.check(got, problem.arrays)


if __name__ == "__main__":
    absltest.main()
