"""Decode, append and plan in the body of a `shard_map`, on 8 CPU devices."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_flashmla import append_kv_cache, flash_mla_with_kvcache, get_mla_metadata
from tests import oracle, problems
from tests.meshes import MeshTest, collectives, make_mesh, put


class ShardMapTest(MeshTest):
    """A plain call in the body of a shard_map: every device works on its part, alone."""

    @parameterized.product(
        spec=((("data",), "model"), (("data", "model"), None), ((), ("data", "model"))),
        check_vma=(True, False),
    )
    def test_batch_and_heads(self, spec, check_vma):
        mesh = make_mesh((2, 4), ("data", "model"))
        problem = problems.make_problem(self.rng, self.rng.integers(0, 400, 8), s_q=2)
        batch, heads = spec

        def body(*operands):
            metadata = get_mla_metadata(operands[-1], 2 * operands[0].shape[2], 1)
            return flash_mla_with_kvcache(*operands, 512, *metadata, causal=True)

        run = jax.jit(
            jax.shard_map(
                body,
                mesh=mesh,
                in_specs=(P(batch, None, heads), P(), P(batch), P(batch)),
                out_specs=(P(batch, None, heads), P(batch, heads)),
                check_vma=check_vma,
            )
        )
        self.assertEqual(collectives(run.lower(*problem.arrays).compile()), [])
        self.assert_close(run(*problem.arrays), oracle.decode(*problem.arrays, causal=True))

    def test_data_parallel_pools(self):
        # Group axes sharded over the devices: each has a pool of its own, with local page ids.
        mesh = make_mesh((8,), ("data",))
        parts = self.draw_pools(8)
        grouped = problems.stack(parts)
        new_kv = self.rng.standard_normal((8, 4, 1, 1, 576)).astype(jnp.bfloat16)

        def body(q, k_cache, table, lengths, new_kv):
            k_cache = append_kv_cache(k_cache, new_kv, table, lengths)
            return k_cache, *flash_mla_with_kvcache(q, k_cache, table, lengths)

        specs = P("data")
        run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(specs,) * 5, out_specs=(specs,) * 3))
        self.assertEqual(collectives(run.lower(*grouped.arrays, new_kv).compile()), [])
        k_cache, *got = run(*grouped.arrays, new_kv)
        for i, part in enumerate(parts):
            want = oracle.decode(part.q, k_cache[i], part.block_table, part.cache_seqlens)
            self.assert_close([x[i] for x in got], want)

    def test_inside_scan_with_a_mesh_that_is_partly_manual(self):
        mesh = make_mesh((2, 4), ("data", "model"))
        problem = problems.make_problem(self.rng, [100, 0, 65, 300])

        def body(*operands):
            def layer(carry, _):
                return carry, flash_mla_with_kvcache(*operands)

            return lax.scan(layer, 0, length=2)[1]

        run = jax.jit(
            jax.shard_map(
                body,
                mesh=mesh,
                in_specs=(P("data"), P(), P("data"), P("data")),
                out_specs=(P(None, "data"), P(None, "data")),
                axis_names={"data"},
            )
        )
        got = run(*problem.arrays)
        self.assert_close([x[1] for x in got], oracle.decode(*problem.arrays))


class ClosureTest(MeshTest):
    """A body may close over operands, which then do not know of the mesh."""

    @parameterized.product(
        axis_type=(AxisType.Auto, AxisType.Explicit), kind=("array", "numpy", "traced", "eager")
    )
    def test_queries(self, axis_type, kind):
        mesh = make_mesh((8,), ("data",), axis_type)
        parts = self.draw_pools(8)
        pools, tables, lengths = problems.stack(parts).arrays[1:]
        q = parts[0].q if kind == "numpy" else jnp.asarray(parts[0].q)

        def run(q, *operands):
            def body(k_cache, table, lengths):
                out, lse = flash_mla_with_kvcache(q, k_cache[0], table[0], lengths[0])
                return out[None], lse[None]

            over = jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
            return over(*operands)

        if kind != "traced":
            traced, run = run, lambda _, *operands: traced(q, *operands)
        operands = put(mesh, (pools, tables, lengths), [("data",)] * 3)
        got = (run if kind == "eager" else jax.jit(run))(jnp.asarray(q), *operands)
        for i, part in enumerate(parts):
            want = oracle.decode(q, *part.arrays[1:])
            self.assert_close([np.asarray(x)[i] for x in got], want)

    def test_all_but_the_lengths(self):
        mesh = make_mesh((8,), ("data",))
        problem = problems.make_problem(self.rng, [100])
        lengths = np.arange(10, 90, 10, dtype=np.int32)

        def body(lengths):
            metadata = get_mla_metadata(lengths, problem.q.shape[2], 1)
            return flash_mla_with_kvcache(*problem.arrays[:3], lengths, 512, *metadata)

        run = jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
        got = jax.jit(run)(lengths)
        for i, length in enumerate(lengths):
            want = oracle.decode(*problem.arrays[:3], [length])
            self.assert_close([x[i : i + 1] for x in got], want)

    def test_the_pool_that_rows_are_appended_to(self):
        mesh = make_mesh((8,), ("data",))
        pool = jnp.zeros((3, 64, 1, 576), jnp.bfloat16)
        table, lengths = jnp.array([[2, 0]], jnp.int32), jnp.array([65], jnp.int32)
        rows = self.rng.standard_normal((8, 1, 1, 1, 576)).astype(jnp.bfloat16)

        def body(rows):
            return append_kv_cache(pool, rows[0], table, lengths)[None]

        run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
        np.testing.assert_array_equal(run(rows)[:, 0, 0], rows[:, 0, 0])


class PartlyManualTest(MeshTest):
    """A `shard_map` over some axes of an explicit mesh: right, though the others are gathered."""

    def setUp(self):
        super().setUp()
        self.mesh = make_mesh((2, 4), ("data", "model"), AxisType.Explicit)

    def run_over_data(self, function, arrays, specs, in_specs, out_specs):
        operands = put(self.mesh, arrays, specs)
        with jax.set_mesh(self.mesh):
            run = jax.shard_map(
                function, in_specs=in_specs, out_specs=out_specs, axis_names={"data"}
            )
            return jax.jit(run)(*operands)

    def test_decode(self):
        problem = problems.make_problem(self.rng, [100, 0, 65, 300])
        of_data = P("data")
        got = self.run_over_data(
            flash_mla_with_kvcache,
            problem.arrays,
            (("data", None, "model"), (), ("data",), ("data",)),
            (of_data, P(), of_data, of_data),
            (of_data, of_data),
        )
        self.assert_close(got, oracle.decode(*problem.arrays))

    def test_plan(self):
        lengths = self.rng.integers(0, 3000, (4, 6), np.int32)

        def plan(lengths):
            return get_mla_metadata(lengths, 16, 1)

        got = self.run_over_data(
            plan, [lengths], [("model", "data")], (P(None, "data"),), P(None, "data")
        )
        for half in (slice(0, 3), slice(3, 6)):
            want = plan(lengths[:, half])
            at = half.start // 3
            parts, splits = want.tile_scheduler_metadata.shape[1], want.num_splits.shape[1]
            for x, y, width in zip(got, want, (parts, splits), strict=True):
                np.testing.assert_array_equal(np.asarray(x)[:, at * width : (at + 1) * width], y)

    def test_append(self):
        pools = self.rng.standard_normal((2, 5, 64, 4, 576)).astype(jnp.bfloat16)
        rows = self.rng.standard_normal((2, 3, 2, 4, 576)).astype(jnp.bfloat16)
        tables = np.tile(np.array([[4, 0], [1, 3], [2, -1]], np.int32), (2, 1, 1))
        lengths = np.array([[65, 64, 1], [0, 128, 7]], np.int32)
        of_data = P("data")
        got = self.run_over_data(
            append_kv_cache,
            (pools, rows, tables, lengths),
            (("data", None, None, "model"), ("data", None, None, "model"), ("data",), ("data",)),
            (of_data,) * 4,
            of_data,
        )
        np.testing.assert_array_equal(got, append_kv_cache(pools, rows, tables, lengths))


if __name__ == "__main__":
    absltest.main()
