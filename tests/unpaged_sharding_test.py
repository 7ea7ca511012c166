"""Decode and append of unpaged caches on meshes of 8 CPU devices: results and collectives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_flashmla import append_kv_cache, flash_mla_with_kvcache, get_mla_metadata
from tests import oracle, problems, support
from tests.meshes import MeshTest, collectives, make_mesh, put

MAX_LEN = 80
AXIS_TYPES = AxisType.Auto, AxisType.Explicit


@functools.partial(jax.jit, donate_argnums=1)
def step(q, k_cache, new_kv, cache_seqlens):
    k_cache = append_kv_cache(k_cache, new_kv, None, cache_seqlens)
    h_kv = k_cache.shape[-2]
    metadata = get_mla_metadata(cache_seqlens, q.shape[-3] * q.shape[-2] // h_kv, h_kv)
    out, lse = flash_mla_with_kvcache(q, k_cache, None, cache_seqlens, 512, *metadata, causal=True)
    return k_cache, out, lse


class UnpagedShardingTest(MeshTest):
    def draw(self, lengths, s_q=2, **options):
        """A problem, and its new rows."""
        problem = problems.make_unpaged_problem(
            self.rng, lengths, MAX_LEN, s_q=s_q, width=584, **options
        )
        shape = len(lengths), s_q, problem.k_cache.shape[-2], 576
        return problem, self.rng.standard_normal(shape).astype(jnp.bfloat16)

    def draw_lengths(self):
        return self.rng.permutation([0, 1, 2, 40, 64, 65, 79, 80])

    def check(self, got, problem, new_kv):
        k_cache, *got = (np.asarray(x) for x in got)
        want = oracle.append(problem.k_cache, new_kv, *problem.arrays[2:])
        support.assert_same_bits(k_cache, want)
        arrays = problem.q, want, *problem.arrays[2:]
        self.assert_close(got, oracle.decode(*arrays, causal=True))

    def run_step(self, mesh, arrays, specs):
        """Runs it without collectives and, where XLA can, in place."""
        operands = put(mesh, arrays, specs)
        with jax.set_mesh(mesh):
            compiled = step.lower(*operands).compile()
            self.assertEqual(collectives(compiled), [])
            if jax.__version_info__ >= (0, 11):  # XLA:CPU of 0.10 scatters through float32
                part = operands[1].addressable_shards[0].data.nbytes
                self.assertEqual(compiled.memory_analysis().alias_size_in_bytes, part)
            got = step(*operands)
        for result, operand in zip(got[:2], (operands[1], operands[0]), strict=True):
            same = result.sharding.is_equivalent_to(operand.sharding, result.ndim)
            self.assertTrue(same, (result.sharding, operand.sharding))
        return got

    @parameterized.product(
        axis_type=AXIS_TYPES,
        spec=(("data", "model"), (("data", "model"), None), (None, ("data", "model"))),
    )
    def test_batch_and_heads(self, axis_type, spec):
        batch, heads = spec
        problem, new_kv = self.draw(self.draw_lengths())
        mesh = make_mesh((2, 4), ("data", "model"), axis_type)
        specs = (batch, None, heads), (batch,), (batch,), (batch,)
        arrays = problem.q, problem.k_cache, new_kv, problem.cache_seqlens
        self.check(self.run_step(mesh, arrays, specs), problem, new_kv)

    def test_kv_heads_with_their_query_heads(self):
        problem, new_kv = self.draw([3, 0, 80, 64], h_kv=4)
        mesh = make_mesh((2, 4), ("data", "model"), AxisType.Explicit)
        rows = "data", None, "model"
        arrays = problem.q, problem.k_cache, new_kv, problem.cache_seqlens
        self.check(self.run_step(mesh, arrays, (rows, rows, rows, ("data",))), problem, new_kv)

    @parameterized.parameters(*AXIS_TYPES)
    def test_groups_and_batch(self, axis_type):
        parts = [self.draw(self.draw_lengths()) for _ in range(4)]
        grouped, new_kv = problems.stack([p for p, _ in parts]), np.stack([x for _, x in parts])
        mesh = make_mesh((2, 4), ("data", "model"), axis_type)
        arrays = grouped.q, grouped.k_cache, new_kv, grouped.cache_seqlens
        got = [np.asarray(x) for x in self.run_step(mesh, arrays, [("model", "data")] * 4)]
        for i, part in enumerate(parts):
            self.check([x[i] for x in got], *part)

    @parameterized.parameters(False, True)
    def test_shard_map(self, check_vma):
        problem, new_kv = self.draw(self.draw_lengths())
        spec = P("data")
        mapped = jax.jit(
            jax.shard_map(
                lambda *operands: step(*operands),
                mesh=make_mesh((8,), ("data",)),
                in_specs=(spec,) * 4,
                out_specs=(spec,) * 3,
                check_vma=check_vma,
            )
        )
        operands = problem.q, problem.k_cache, new_kv, problem.cache_seqlens
        self.assertEqual(collectives(mapped.lower(*operands).compile()), [])
        self.check(mapped(*operands), problem, new_kv)

    def test_vmap_over_queries_of_whole_sequences(self):
        problem, _ = self.draw(self.draw_lengths())
        mesh = make_mesh((2, 4), ("data", "model"), AxisType.Explicit)
        arrays = np.stack([problem.q, -problem.q]), problem.k_cache, problem.cache_seqlens
        q, k_cache, lengths = put(mesh, arrays, ((None, None, None, "model"), (), ()))
        run = jax.jit(
            jax.vmap(lambda x: flash_mla_with_kvcache(x, k_cache, None, lengths, causal=True))
        )
        with jax.set_mesh(mesh):
            self.assertEqual(collectives(run.lower(q).compile()), [])
            out, lse = run(q)
        self.assert_close((out[0], lse[0]), oracle.decode(*problem.arrays, causal=True))

    @parameterized.named_parameters(
        ("whole_cache", 1, (), "k_cache: expected b sharded as q's, .* got"),
        ("whole_queries", 0, (), "k_cache: expected b sharded as q's, .* got"),
        ("tokens", 1, ("data", "model"), "k_cache: expected only group axes, b and h_kv to be"),
        ("lengths", 2, ("model",), "cache_seqlens: expected b sharded as q's"),
    )
    def test_shardings_of_decode_that_would_need_other_devices(self, index, spec, message):
        problem, _ = self.draw(self.draw_lengths())
        mesh = make_mesh((2, 4), ("data", "model"), AxisType.Explicit)
        specs = [("data",)] * 3
        specs[index] = spec
        operands = put(mesh, (problem.q, problem.k_cache, problem.cache_seqlens), specs)
        with jax.set_mesh(mesh), self.assertRaisesRegex(ValueError, message):
            jax.jit(lambda q, k, n: flash_mla_with_kvcache(q, k, None, n))(*operands)

    @parameterized.named_parameters(
        ("tokens", 0, ("data", "model"), "k_cache: expected only group axes, b and h_kv to be"),
        ("rows", 1, (), "new_kv: expected .* to fit k_cache's"),
        ("lengths", 2, ("model",), "cache_seqlens: expected .* to fit k_cache's"),
    )
    def test_shardings_of_append_that_would_need_other_devices(self, index, spec, message):
        problem, new_kv = self.draw(self.draw_lengths())
        mesh = make_mesh((2, 4), ("data", "model"), AxisType.Explicit)
        specs = [("data",)] * 3
        specs[index] = spec
        operands = put(mesh, (problem.k_cache, new_kv, problem.cache_seqlens), specs)
        with jax.set_mesh(mesh), self.assertRaisesRegex(ValueError, message):
            jax.jit(lambda k, x, n: append_kv_cache(k, x, None, n))(*operands)


if __name__ == "__main__":
    absltest.main()
