"""Decode and append of FP8 caches on meshes of 8 CPU devices: results and collectives."""

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
from tests import fp8
from tests.meshes import MeshTest, collectives, make_mesh, put

NAMES = tuple(fp8.FORMATS)
AXIS_TYPES = AxisType.Auto, AxisType.Explicit


@functools.partial(jax.jit, donate_argnums=1)
def step(q, k_cache, new_kv, block_table, cache_seqlens, k_scale):
    k_cache = append_kv_cache(k_cache, new_kv, block_table, cache_seqlens, k_scale=k_scale)
    h_kv = k_cache.shape[-2]
    metadata = get_mla_metadata(cache_seqlens, q.shape[-3] * q.shape[-2] // h_kv, h_kv)
    out, lse = flash_mla_with_kvcache(
        *(q, k_cache, block_table, cache_seqlens, 512, *metadata), k_scale=k_scale, causal=True
    )
    return k_cache, out, lse


class Fp8ShardingTest(MeshTest):
    def draw(self, lengths, name, **options):
        """A problem, and its new rows."""
        problem = fp8.make_problem(self.rng, lengths, name, s_q=2, padding=16, **options)
        return problem, fp8.draw_rows(self.rng, problem)

    def check(self, got, problem, name, new_kv):
        k_cache, *got = (np.asarray(x) for x in got)
        want = fp8.append(problem, name, new_kv)
        fp8.assert_same_bytes(k_cache, want)
        problem.values = fp8.dequantize(want, name, problem.k_scale)
        out, lse = problem.reference(causal=True)
        np.testing.assert_allclose(got[0].astype(np.float64), out, atol=5e-2, rtol=1e-2)
        slack = fp8.tolerance(problem.q, problem.values)[1]
        np.testing.assert_allclose(got[1], lse, atol=1e-4 + slack, rtol=1e-5)

    def run_step(self, mesh, arrays, specs):
        """Runs it without collectives and in place. `None` operands have no specs."""
        there = [(x, spec) for x, spec in zip(arrays, specs, strict=True) if x is not None]
        operands = iter(put(mesh, *zip(*there, strict=True)))
        operands = [None if x is None else next(operands) for x in arrays]
        with jax.set_mesh(mesh):
            compiled = step.lower(*operands).compile()
            self.assertEqual(collectives(compiled), [])
            part = operands[1].addressable_shards[0].data.nbytes
            self.assertEqual(compiled.memory_analysis().alias_size_in_bytes, part)
            got = step(*operands)
        for result, operand in zip(got[:2], (operands[1], operands[0]), strict=True):
            same = result.sharding.is_equivalent_to(operand.sharding, result.ndim)
            self.assertTrue(same, (result.sharding, operand.sharding))
        return got

    @parameterized.product(name=NAMES, axis_type=AXIS_TYPES)
    def test_heads(self, name, axis_type):
        problem, new_kv = self.draw(self.rng.integers(0, 200, 8), name)
        mesh = make_mesh((2, 4), ("data", "model"), axis_type)
        q, k_cache, table, lengths = problem.arrays
        arrays = q, k_cache, new_kv, table, lengths, problem.k_scale
        got = self.run_step(mesh, arrays, ((None, None, "model"), (), (), (), (), ()))
        self.check(got, problem, name, new_kv)

    @parameterized.product(name=NAMES, axis_type=AXIS_TYPES, pair=(False, True))
    def test_batch_and_heads_of_decode(self, name, axis_type, pair):
        problem, _ = self.draw(self.rng.integers(0, 200, 8), name)
        mesh = make_mesh((2, 4), ("data", "model"), axis_type)
        specs = ("data", None, "model"), (), ("data",), ("data",)
        q, *rest = put(mesh, problem.arrays, specs)
        scale = [] if problem.k_scale is None else put(mesh, [problem.k_scale], [()])

        @jax.jit
        def run(q, k_cache, table, lengths, *scale):
            q = (q[..., :512], q[..., 512:]) if pair else q
            scale = scale[0] if scale else None
            return flash_mla_with_kvcache(q, k_cache, table, lengths, k_scale=scale)

        with jax.set_mesh(mesh):
            self.assertEqual(collectives(run.lower(q, *rest, *scale).compile()), [])
            got = run(q, *rest, *scale)
        out, lse = problem.reference()
        np.testing.assert_allclose(np.asarray(got[0], np.float64), out, atol=5e-2, rtol=1e-2)
        slack = fp8.tolerance(problem.q, problem.values)[1]
        np.testing.assert_allclose(got[1], lse, atol=1e-4 + slack, rtol=1e-5)

    @parameterized.product(name=NAMES, axis_type=AXIS_TYPES, unpaged=(False, True))
    def test_groups(self, name, axis_type, unpaged):
        max_len = 80 if unpaged else None
        parts = [
            self.draw(self.rng.permutation([3, 0, 80, 64]), name, max_len=max_len) for _ in range(8)
        ]
        stacked = fp8.stack([problem for problem, _ in parts])
        new_kv = np.stack([rows for _, rows in parts])
        mesh = make_mesh((8,), ("data",), axis_type)
        q, k_cache, table, lengths = stacked.arrays
        arrays = q, k_cache, new_kv, None if unpaged else table, lengths, stacked.k_scale
        got = [np.asarray(x) for x in self.run_step(mesh, arrays, [("data",)] * 6)]
        for i, (problem, rows) in enumerate(parts):
            self.check([x[i] for x in got], problem, name, rows)

    @parameterized.product(name=NAMES, axis_type=AXIS_TYPES)
    def test_batch_and_heads_of_an_unpaged_cache(self, name, axis_type):
        lengths = self.rng.permutation([0, 1, 2, 40, 64, 65, 79, 80])
        problem, new_kv = self.draw(lengths, name, max_len=80)
        mesh = make_mesh((2, 4), ("data", "model"), axis_type)
        arrays = problem.q, problem.k_cache, new_kv, None, problem.cache_seqlens, problem.k_scale
        specs = ("data", None, "model"), ("data",), ("data",), (), ("data",), ()
        self.check(self.run_step(mesh, arrays, specs), problem, name, new_kv)

    @parameterized.parameters(*NAMES)
    def test_kv_heads_with_their_query_heads(self, name):
        problem, new_kv = self.draw([3, 0, 80, 64], name, h_kv=4, max_len=80)
        mesh = make_mesh((2, 4), ("data", "model"), AxisType.Explicit)
        rows = "data", None, "model"
        arrays = problem.q, problem.k_cache, new_kv, None, problem.cache_seqlens, problem.k_scale
        got = self.run_step(mesh, arrays, (rows, rows, rows, (), ("data",), ()))
        self.check(got, problem, name, new_kv)

    @parameterized.product(name=NAMES, check_vma=(False, True))
    def test_shard_map(self, name, check_vma):
        parts = [self.draw(self.rng.permutation([3, 0, 80, 64]), name) for _ in range(8)]
        stacked = fp8.stack([problem for problem, _ in parts])
        new_kv = np.stack([rows for _, rows in parts])
        q, k_cache, *rest = stacked.arrays
        operands = q, k_cache, new_kv, *rest
        if stacked.k_scale is not None:
            operands = *operands, stacked.k_scale

        def body(*operands):
            return step(*operands) if len(operands) == 6 else step(*operands, None)

        mapped = jax.jit(
            jax.shard_map(
                body,
                mesh=make_mesh((8,), ("data",)),
                in_specs=(P("data"),) * len(operands),
                out_specs=(P("data"),) * 3,
                check_vma=check_vma,
            )
        )
        self.assertEqual(collectives(mapped.lower(*operands).compile()), [])
        got = [np.asarray(x) for x in mapped(*operands)]
        for i, (problem, rows) in enumerate(parts):
            self.check([x[i] for x in got], problem, name, rows)

    def test_scales_sharded_other_than_their_groups(self):
        parts = [self.draw([3, 64], "fp8_per_tensor")[0] for _ in range(8)]
        stacked = fp8.stack(parts)
        mesh = make_mesh((8,), ("data",), AxisType.Explicit)
        operands = put(mesh, stacked.arrays, [("data",)] * 4)
        (k_scale,) = put(mesh, [stacked.k_scale], [()])
        with (
            jax.set_mesh(mesh),
            self.assertRaisesRegex(ValueError, "k_scale: expected group axes sharded as q's"),
        ):
            jax.jit(flash_mla_with_kvcache)(*operands, k_scale=k_scale)


class ContextParallelTest(MeshTest):
    """Pools of FP8 rows on several devices, of fp8_per_tensor each with a scale of its own."""

    @parameterized.product(
        cache=(("fp8_per_tensor", False), ("fp8_block", False), ("fp8_block", True)),
        split=context_parallel.SPLITS,
        causal=(False, True),
    )
    def test_append_and_decode(self, cache, split, causal):
        name, power_of_two = cache
        mesh, page, columns, s_q = make_mesh((8,), ("context",)), 16, 2, 3
        lengths = np.array([0, 1, 100, 256, 3], np.int32)
        batch, capacity = len(lengths), 8 * columns * page
        kind = fp8.FORMATS[name]
        draw = functools.partial(self.rng.standard_normal, dtype=np.float32)
        q, rows = draw((batch, s_q, 6, 576)).astype(jnp.bfloat16), draw((batch, capacity, 1, 576))
        scales = self.rng.uniform(0.01, 0.02, 8).astype(np.float32)
        table = np.arange(batch * columns, dtype=np.int32).reshape(batch, columns)

        # All rows but the last of each sequence are there, each where it belongs.
        pools = np.full((8, batch * columns, page, 1, kind.row_width), fp8.POISON[name], np.uint8)
        values = np.zeros((batch, capacity, 1, 576))
        for position in range(capacity):
            if split == "interleaved":
                turn, device = position // (8 * page), position // page % 8
            else:
                turn, device = position // page % columns, position // (columns * page)
            row = fp8.quantize(rows[:, position], name, scales[device], power_of_two)
            values[:, position] = fp8.dequantize(row, name, scales[device])
            old = position < lengths - s_q
            pools[device, table[old, turn], position % page] = row[old].view(np.uint8)
        new_kv = np.zeros((batch, s_q, 1, 576), np.float32)
        for i, length in enumerate(lengths):
            last = rows[i, max(length - s_q, 0) : length]
            new_kv[i, s_q - len(last) :] = last

        def body(pool, scale, q, new_kv, lengths):
            k_scale = scale[0] if kind.scale_per_cache else None
            options = {"axis_name": "context", "split": split, "k_scale": k_scale}
            pool = context_parallel.append(
                *(pool[0], new_kv, table, lengths), power_of_two_scales=power_of_two, **options
            )
            return context_parallel.decode(q, pool, table, lengths, causal=causal, **options)

        run = jax.jit(
            jax.shard_map(
                body,
                mesh=mesh,
                in_specs=(P("context"), P("context"), P(), P(), P()),
                out_specs=(P(), P()),
            )
        )
        out, lse = run(pools.view(kind.dtype), scales, q, new_kv, lengths)
        whole = fp8.Fp8Problem(q, None, None, np.arange(batch)[:, None], lengths, values)
        want = whole.reference(causal=causal)
        np.testing.assert_allclose(np.asarray(out, np.float64), want[0], atol=2e-2)
        slack = fp8.tolerance(q, values)[1]
        np.testing.assert_allclose(lse, want[1], atol=1e-4 + slack, rtol=1e-5)


if __name__ == "__main__":
    absltest.main()
