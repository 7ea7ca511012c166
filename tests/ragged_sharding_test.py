"""Packed queries and rows on a mesh of 8 CPU devices: right, with nothing exchanged."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_flashmla import append_kv_cache, flash_mla_with_kvcache
from tests import meshes, oracle, problems, support

MOST = 3


def step(pool, q, rows, table, lengths, cuts):
    """Appends and decodes; with `rows` None, decodes."""
    if rows is not None:
        pool = append_kv_cache(pool, rows, table, lengths, cu_seqlens_q=cuts)
    out, lse = flash_mla_with_kvcache(
        q, pool, table, lengths, causal=True, cu_seqlens_q=cuts, max_seqlen_q=MOST
    )
    return pool, out, lse


class RaggedShardingTest(meshes.MeshTest):
    def operands(self, h_kv=1, groups=0):
        """Operands, and what they give: the pool, out and lse."""

        def one():
            lengths = self.rng.permutation([5, 70, 0, 64, 3])
            problem = problems.make_problem(self.rng, lengths, s_q=MOST, h_q=16, h_kv=h_kv)
            counts = self.rng.permutation([3, 0, 1, 2, 3])
            queries = [x[MOST - n :] for x, n in zip(problem.q, counts, strict=True)]
            spare = np.full((2, *problem.q.shape[2:]), np.nan, problem.q.dtype)
            q = np.concatenate([*queries, spare])
            cuts = np.append(0, np.cumsum(counts)).astype(np.int32)
            rows = self.rng.standard_normal((len(q), h_kv, 576)).astype(q.dtype)
            operands = problem.k_cache, q, rows, *problem.arrays[2:], cuts
            pool = oracle.append_packed(problem.k_cache, rows, *problem.arrays[2:], cuts)
            want = oracle.decode_packed(q, pool, *problem.arrays[2:], cuts, causal=True)
            return operands, (pool, *want)

        if not groups:
            return one()
        parts = [one() for _ in range(groups)]
        return [[np.stack(x) for x in zip(*y, strict=True)] for y in zip(*parts, strict=True)]

    def check(self, mesh, specs, operands, want):
        with jax.set_mesh(mesh):
            operands = meshes.put(mesh, operands, specs)
            compiled = jax.jit(step).lower(*operands).compile()
            pool, *got = compiled(*operands)
        self.assertEqual(meshes.collectives(compiled), [])
        support.assert_same_bits(pool, want[0])
        self.assert_close(got, want[1:])
        return pool, *got

    @parameterized.parameters(AxisType.Auto, AxisType.Explicit)
    def test_heads(self, axis_type):
        mesh = meshes.make_mesh((8,), ("model",), axis_type)
        specs = (), (None, "model"), (), (), (), ()
        _, out, lse = self.check(mesh, specs, *self.operands())
        self.assertEqual(out.sharding.spec[1], "model")
        self.assertEqual(lse.sharding.spec[0], "model")

    def test_kv_heads_on_a_mesh_with_explicit_axes(self):
        mesh = jax.make_mesh(
            (4,), ("model",), axis_types=(AxisType.Explicit,), devices=jax.devices("cpu")[:4]
        )
        specs = (None, None, "model"), (None, "model"), (None, "model"), (), (), ()
        self.check(mesh, specs, *self.operands(h_kv=4))

    @parameterized.parameters(AxisType.Auto, AxisType.Explicit)
    def test_groups_and_heads(self, axis_type):
        mesh = meshes.make_mesh((2, 4), ("data", "model"), axis_type)
        specs = [("data",)] * 6
        specs[1] = "data", None, "model"
        self.check(mesh, specs, *self.operands(groups=2))

    def test_shard_map_over_heads(self):
        mesh = meshes.make_mesh((8,), ("model",))
        operands, want = self.operands()
        q = P(None, "model")
        fun = jax.shard_map(
            step, mesh=mesh, in_specs=(P(), q, P(), P(), P(), P()), out_specs=(P(), q, P("model"))
        )
        compiled = jax.jit(fun).lower(*operands).compile()
        self.assertEqual(meshes.collectives(compiled), [])
        pool, *got = compiled(*operands)
        support.assert_same_bits(pool, want[0])
        self.assert_close(got, want[1:])

    def test_packed_tokens_divided_over_explicit_axes(self):
        mesh = meshes.make_mesh((8,), ("data",), AxisType.Explicit)
        (k_cache, _, _, table, lengths, cuts), _ = self.operands()
        with jax.set_mesh(mesh):
            operands = (
                jnp.zeros((16, 16, 576), k_cache.dtype),
                jnp.zeros((8, 1, 576), k_cache.dtype),
            )
            q, rows = meshes.put(mesh, operands, [("data",)] * 2)
            with self.assertRaisesRegex(ValueError, "q: expected total not to be sharded"):
                step(k_cache, q, None, table, lengths, cuts)
            with self.assertRaisesRegex(ValueError, "new_kv: expected total not to be sharded"):
                step(k_cache, None, rows, table, lengths, cuts)


if __name__ == "__main__":
    absltest.main()
