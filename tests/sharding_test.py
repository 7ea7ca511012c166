"""Decode, append and plan on meshes of 8 CPU devices: results and collectives."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_flashmla import append_kv_cache, flash_mla_with_kvcache, get_mla_metadata
from tests import oracle, problems, support
from tests.meshes import MeshTest, collectives, make_mesh, put


@functools.partial(jax.jit, static_argnames=("planned", "pair"))
def plan_and_decode(q, *rest, planned, pair):
    h_kv = rest[0].shape[-2]
    metadata = get_mla_metadata(rest[-1], q.shape[-3] * q.shape[-2] // h_kv, h_kv)
    q = (q[..., :512], q[..., 512:]) if pair else q
    return flash_mla_with_kvcache(q, *rest, 512, *(metadata if planned else ()), causal=True)


def two_layers(q, *rest):
    def layer(q, _):
        out, lse = flash_mla_with_kvcache(q, *rest)
        return q.at[..., :512].set(out), lse

    return lax.scan(layer, q, length=2)


# `spec`: the mesh axes of the batch and of the heads.
WAYS_TO_DIVIDE = parameterized.product(
    spec=(
        ("data", "model"),
        (("data", "model"), None),
        (None, ("data", "model")),
        (None, None),
    ),
    planned=(False, True),
    pair=(False, True),
)


class AutomaticTest(MeshTest):
    """Meshes with automatic axes: XLA propagates shardings through the program."""

    def setUp(self):
        super().setUp()
        self.mesh = make_mesh((2, 4), ("data", "model"))

    def check(self, arrays, specs, want, planned=True, pair=False):
        operands = put(self.mesh, arrays, specs)
        compiled = plan_and_decode.lower(*operands, planned=planned, pair=pair).compile()
        self.assertEqual(collectives(compiled), [])
        got = plan_and_decode(*operands, planned=planned, pair=pair)
        self.assertTrue(got[0].sharding.is_equivalent_to(operands[0].sharding, got[0].ndim))
        self.assert_close([np.asarray(x) for x in got], want)

    @WAYS_TO_DIVIDE
    def test_batch_and_heads(self, spec, planned, pair):
        batch, heads = spec
        problem = problems.make_problem(self.rng, self.rng.integers(0, 400, 8), s_q=2)
        want = oracle.decode(*problem.arrays, causal=True)
        specs = (batch, None, heads), (), (batch,), (batch,)
        self.check(problem.arrays, specs, want, planned, pair)

    @parameterized.parameters((("data", None, None),), ((None, None, "data"),))
    def test_two_devices(self, spec):
        self.mesh = make_mesh((2,), ("data",))
        problem = problems.make_problem(self.rng, self.rng.integers(0, 400, 4), s_q=2)
        want = oracle.decode(*problem.arrays, causal=True)
        self.check(problem.arrays, (spec, (), spec[:1], spec[:1]), want)

    def test_other_pages_and_wider_rows(self):
        problem = problems.make_problem(
            self.rng, self.rng.integers(0, 400, 8), s_q=2, page=256, width=640
        )
        specs = ("data", None, "model"), (), ("data",), ("data",)
        self.check(problem.arrays, specs, oracle.decode(*problem.arrays, causal=True))

    @parameterized.parameters(False, True)
    def test_groups(self, planned):
        parts = self.draw_pools(4)
        wants = zip(*(oracle.decode(*part.arrays) for part in parts), strict=True)
        want = [np.stack(x) for x in wants]
        self.check(problems.stack(parts).arrays, [("model",)] * 4, want, planned)

    def test_inside_scan_with_a_donated_carry(self):
        problem = problems.make_problem(self.rng, [3, 0, 200, 64])
        specs = (("data", None, "model"), (), ("data",), ("data",))
        operands = put(self.mesh, problem.arrays, specs)

        layers = jax.jit(two_layers, donate_argnums=0)
        want = layers(*(jnp.asarray(x).copy() for x in problem.arrays))[1]
        self.assertEqual(collectives(layers.lower(*operands).compile()), [])
        np.testing.assert_allclose(layers(*operands)[1], want, atol=1e-2)

    def test_vmap(self):
        problem = problems.make_problem(self.rng, [3, 0, 200, 64], s_q=2)
        specs = (("data", None, "model"), (), ("data",), ("data",))
        q, *rest = put(self.mesh, problem.arrays, specs)
        out, lse = jax.jit(jax.vmap(flash_mla_with_kvcache, in_axes=(0, *[None] * 3)))(
            jnp.stack([q, -q]), *rest
        )
        want = oracle.decode(*problem.arrays)
        self.assert_close((out[0], lse[0]), want)

    def test_kv_heads_are_right_though_not_divided(self):
        problem = problems.make_problem(self.rng, [3, 0, 200, 64], h_kv=2)
        q, *rest = problem.arrays
        q = jax.device_put(q, jax.NamedSharding(self.mesh, P(None, None, "data")))
        got = plan_and_decode(q, *rest, planned=False, pair=False)
        self.assert_close(got, oracle.decode(*problem.arrays))

    def test_sharded_pages_are_right_though_gathered(self):
        problem = problems.make_problem(self.rng, [3, 0, 200, 64], max_blocks=4)
        k_cache = np.resize(problem.k_cache, (16, *problem.k_cache.shape[1:]))
        sharded = jax.device_put(k_cache, jax.NamedSharding(self.mesh, P("data")))
        operands = problem.q, sharded, *problem.arrays[2:]
        compiled = plan_and_decode.lower(*operands, planned=True, pair=False).compile()
        self.assertIn("all-gather", collectives(compiled))
        got = plan_and_decode(*operands, planned=True, pair=False)
        self.assert_close(got, oracle.decode(*problem.arrays))


class ExplicitTest(MeshTest):
    """Meshes with explicit axes, which `jax.make_mesh` makes: shardings are part of types."""

    def setUp(self):
        super().setUp()
        self.mesh = make_mesh((2, 4), ("data", "model"), AxisType.Explicit)

    @WAYS_TO_DIVIDE
    def test_batch_and_heads(self, spec, planned, pair):
        batch, heads = spec
        problem = problems.make_problem(self.rng, self.rng.integers(0, 400, 8), s_q=2)
        specs = (batch, None, heads), (), (batch,), (batch,)
        operands = put(self.mesh, problem.arrays, specs)
        with jax.set_mesh(self.mesh):
            compiled = plan_and_decode.lower(*operands, planned=planned, pair=pair).compile()
            got = plan_and_decode(*operands, planned=planned, pair=pair)
        self.assertEqual(collectives(compiled), [])
        self.assertEqual(jax.typeof(got[0]).sharding.spec, P(batch, None, heads, None))
        self.assertEqual(jax.typeof(got[1]).sharding.spec, P(batch, heads, None))
        self.assert_close(got, oracle.decode(*problem.arrays, causal=True))

    def test_table_and_lengths_may_be_whole(self):
        problem = problems.make_problem(self.rng, [3, 0, 200, 64])
        operands = put(self.mesh, problem.arrays, (("data",), (), (), ()))
        with jax.set_mesh(self.mesh):
            compiled = plan_and_decode.lower(*operands, planned=True, pair=False).compile()
            got = plan_and_decode(*operands, planned=True, pair=False)
        self.assertEqual(collectives(compiled), [])
        self.assert_close(got, oracle.decode(*problem.arrays))

    def test_kv_heads_with_their_query_heads(self):
        problem = problems.make_problem(self.rng, [3, 0, 200, 64], h_kv=4)
        specs = ("data", None, "model"), (None, None, "model"), ("data",), ("data",)
        operands = put(self.mesh, problem.arrays, specs)
        with jax.set_mesh(self.mesh):
            compiled = plan_and_decode.lower(*operands, planned=False, pair=False).compile()
            got = plan_and_decode(*operands, planned=False, pair=False)
        self.assertEqual(collectives(compiled), [])
        self.assert_close(got, oracle.decode(*problem.arrays))

    @parameterized.parameters(False, True)
    def test_groups(self, planned):
        parts = self.draw_pools(4)
        operands = put(self.mesh, problems.stack(parts).arrays, [("model",)] * 4)
        with jax.set_mesh(self.mesh):
            compiled = plan_and_decode.lower(*operands, planned=planned, pair=False).compile()
            got = plan_and_decode(*operands, planned=planned, pair=False)
        self.assertEqual(collectives(compiled), [])
        for i, part in enumerate(parts):
            self.assert_close([np.asarray(x)[i] for x in got], oracle.decode(*part.arrays))

    @parameterized.parameters(
        # Which operands are mapped; mesh axes of the mapped axis, and of the batch.
        ((0, 0, None, 0), "model", None),
        ((None, 0, 0, 0), "model", None),
        ((0, 0, 0, None), "model", "data"),
        ((0, None, None, None), None, "model"),
        ((0, None, None, None), "model", "data"),
        ((0, None, 0, 0), "model", None),
        ((None, None, 0, None), None, "model"),
    )
    def test_vmap(self, in_axes, mapped, batch):
        lengths = np.array([3, 0, 300, 64], np.int32)
        parts = [problems.make_problem(self.rng, lengths) for _ in range(4)]
        for part in parts[1:]:  # all tables are as good for all pools
            part.block_table[:] = parts[0].block_table
        if in_axes[1] is None:
            for part in parts[1:]:
                part.k_cache[:] = parts[0].k_cache
        operands, specs = [], []
        stacked = problems.stack(parts).arrays
        for i, (x, axis) in enumerate(zip(stacked, in_axes, strict=True)):
            of_batch = () if i == 1 else (batch,)
            operands.append(x[0] if axis is None else x)
            specs.append(of_batch if axis is None else (mapped, *of_batch))
        operands = put(self.mesh, operands, specs)
        run = jax.jit(jax.vmap(flash_mla_with_kvcache, in_axes))
        with jax.set_mesh(self.mesh):
            self.assertEqual(collectives(run.lower(*operands).compile()), [])
            got = run(*operands)
        for i in range(4):
            example = [x[0] if a is None else x[i] for x, a in zip(stacked, in_axes, strict=True)]
            self.assert_close([np.asarray(x)[i] for x in got], oracle.decode(*example))

    def test_vmap_of_append(self):
        mesh = make_mesh((4,), ("data",), AxisType.Explicit)
        pools, rows = (
            self.rng.standard_normal((4, *shape, 576)).astype(jnp.bfloat16)
            for shape in ((3, 64, 1), (2, 1, 1))
        )
        table, lengths = np.array([[2, 0], [1, -1]], np.int32), np.array([65, 7], np.int32)
        operands = put(mesh, (pools, rows, table, lengths), (("data",), ("data",), (), ()))
        with jax.set_mesh(mesh):
            got = jax.jit(jax.vmap(append_kv_cache, (0, 0, None, None)))(*operands)
        for i in range(4):
            want = append_kv_cache(pools[i], rows[i], table, lengths)
            support.assert_same_bits(np.asarray(got)[i], want)

    def test_inside_scan(self):
        problem = problems.make_problem(self.rng, [3, 0, 200, 64])
        operands = put(
            self.mesh, problem.arrays, (("data", None, "model"), (), ("data",), ("data",))
        )

        layers = jax.jit(two_layers)
        with jax.set_mesh(self.mesh):
            compiled = layers.lower(*operands).compile()
            got = layers(*operands)[1]
        self.assertEqual(collectives(compiled), [])
        want = layers(*map(jnp.asarray, problem.arrays))[1]
        np.testing.assert_allclose(got, want, atol=1e-2)

    def test_export(self):
        pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers")
        problem = problems.make_problem(self.rng, [3, 0, 200, 64])
        specs = ("data", None, "model"), (), ("data",), ("data",)
        operands = put(self.mesh, problem.arrays, specs)
        with jax.set_mesh(self.mesh):
            export = jax.export.export(jax.jit(flash_mla_with_kvcache), platforms=["cpu"])
            exported = export(*operands)
            got = jax.export.deserialize(exported.serialize()).call(*operands)
        self.assertEqual(exported.nr_devices, 8)
        self.assert_close([np.asarray(x) for x in got], oracle.decode(*problem.arrays))

    @parameterized.named_parameters(
        ("pages", 1, ("data",), "k_cache: expected pages not to be sharded.*context_parallel"),
        ("tokens", 1, (None, "data"), "k_cache: expected only group axes and h_kv"),
        ("columns", 0, (None, None, None, "model"), "q: expected only group axes, b and h_q"),
        ("table", 2, (None, "model"), "block_table: expected max_blocks not to be"),
        ("batches", 3, ("model",), "cache_seqlens: expected b sharded as q's"),
    )
    def test_shardings_that_would_need_other_devices(self, index, spec, message):
        problem = problems.make_problem(self.rng, [3, 0, 200, 64], max_blocks=4)
        k_cache = np.resize(problem.k_cache, (16, *problem.k_cache.shape[1:]))
        specs = [("data",), (), ("data",), ("data",)]
        specs[index] = spec
        arrays = problem.q, k_cache, *problem.arrays[2:]
        operands = put(self.mesh, arrays, specs)
        with jax.set_mesh(self.mesh), self.assertRaisesRegex(ValueError, message):
            jax.jit(flash_mla_with_kvcache)(*operands)

    def test_heads_of_several_kv_heads(self):
        problem = problems.make_problem(self.rng, [3, 0, 200, 64], h_kv=2)
        operands = put(self.mesh, problem.arrays, ((None, None, "data"), (), (), ()))
        with (
            jax.set_mesh(self.mesh),
            self.assertRaisesRegex(ValueError, "k_cache: expected h_kv sharded as q's h_q"),
        ):
            jax.jit(flash_mla_with_kvcache)(*operands)


class AppendTest(MeshTest):
    """append_kv_cache and the plan, divided over a mesh."""

    @parameterized.parameters(AxisType.Auto, AxisType.Explicit)
    def test_data_parallel_pools(self, axis_type):
        mesh = make_mesh((8,), ("data",), axis_type)
        parts = self.draw_pools(8)
        grouped = problems.stack(parts)
        new_kv = self.rng.standard_normal((8, 4, 1, 1, 576)).astype(jnp.bfloat16)
        operands = put(mesh, (*grouped.arrays, new_kv), [("data",)] * 5)

        @functools.partial(jax.jit, donate_argnums=1)
        def step(q, k_cache, table, lengths, new_kv):
            k_cache = append_kv_cache(k_cache, new_kv, table, lengths)
            metadata = get_mla_metadata(lengths, 16, 1)
            return k_cache, *flash_mla_with_kvcache(q, k_cache, table, lengths, 512, *metadata)

        with jax.set_mesh(mesh):
            compiled = step.lower(*operands).compile()
            self.assertEqual(collectives(compiled), [])
            if jax.__version_info__ >= (0, 11):  # XLA:CPU of 0.10 scatters through float32
                local_pool = grouped.k_cache.nbytes // 8
                self.assertEqual(compiled.memory_analysis().alias_size_in_bytes, local_pool)
            k_cache, *got = (np.asarray(x) for x in step(*operands))
        for i, part in enumerate(parts):
            rows = append_kv_cache(part.k_cache, new_kv[i], part.block_table, part.cache_seqlens)
            support.assert_same_bits(k_cache[i], rows)
            want = oracle.decode(part.q, k_cache[i], part.block_table, part.cache_seqlens)
            self.assert_close([x[i] for x in got], want)

    @parameterized.product(
        axis_type=(AxisType.Auto, AxisType.Explicit), cache=({}, {"page": 16, "width": 640})
    )
    def test_kv_heads(self, axis_type, cache):
        mesh = make_mesh((2, 4), ("data", "model"), axis_type)
        problem = problems.make_problem(self.rng, [3, 0, 300, 64], h_kv=4, **cache)
        new_kv = self.rng.standard_normal((4, 2, 4, 576)).astype(jnp.bfloat16)
        specs = P(None, None, "model"), P(None, None, "model"), P(), P()
        arrays = problem.k_cache, new_kv, problem.block_table, problem.cache_seqlens
        operands = put(mesh, arrays, specs)
        with jax.set_mesh(mesh):
            append = jax.jit(append_kv_cache)
            self.assertEqual(collectives(append.lower(*operands).compile()), [])
            got = np.asarray(append(*operands))
        want = np.asarray(append_kv_cache(*arrays))
        support.assert_same_bits(got, want)

    @parameterized.named_parameters(
        ("pages", 0, P("data"), "k_cache: expected only group axes and h_kv to be sharded"),
        ("rows", 1, P("data"), "new_kv: expected .* to fit k_cache's"),
        ("table", 2, P("data"), "block_table: expected .* to fit k_cache's"),
    )
    def test_shardings_that_would_need_other_devices(self, index, spec, message):
        mesh = make_mesh((8,), ("data",), AxisType.Explicit)
        shapes = (16, 64, 1, 576), (8, 1, 1, 576), (8, 3), (8,)
        dtypes = jnp.bfloat16, jnp.bfloat16, jnp.int32, jnp.int32
        operands = [jnp.zeros(*x) for x in zip(shapes, dtypes, strict=True)]
        with jax.set_mesh(mesh):
            operands[index] = jax.device_put(operands[index], jax.NamedSharding(mesh, spec))
            with self.assertRaisesRegex(ValueError, message):
                jax.jit(append_kv_cache)(*operands)


if __name__ == "__main__":
    absltest.main()
