"""One sequence's keys on several of 8 CPU devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

from jax_flashmla import context_parallel
from tests import oracle, problems, support
from tests.meshes import COLLECTIVES, MeshTest, collectives, make_mesh

PAGE = 64


def place_of(page, devices, split, max_blocks):
    """The device that has a sequence's page, and the column of that device's table."""
    return (page % devices, page // devices) if split == "interleaved" else divmod(page, max_blocks)


def causal_decode(mesh, split):
    """The jitted decode of whole pools and tables `[devices, ..]`."""

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P("context"), P("context"), P()),
        out_specs=P(),
    )
    def run(q, pools, tables, lengths):
        where = {"axis_name": "context", "split": split}
        return context_parallel.decode(q, pools[0], tables[0], lengths, causal=True, **where)

    return run


class ContextParallelTest(MeshTest):
    """One sequence's keys on several devices."""

    def spread(self, problem, devices, split, max_blocks):
        """Pools and tables of all devices: pages in random order, everything else NaN."""
        page = problem.k_cache.shape[1]
        batch = len(problem.cache_seqlens)
        pages = batch * max_blocks + 2
        pools = np.full((devices, pages, *problem.k_cache.shape[1:]), np.nan, problem.q.dtype)
        tables = np.full((devices, batch, max_blocks), problems.UNUSED_TABLE_ENTRY, np.int32)
        for device in range(devices):
            free = iter(self.rng.permutation(pages))
            for i, length in enumerate(problem.cache_seqlens):
                for j in range(-(-int(length) // page)):
                    owner, local = place_of(j, devices, split, max_blocks)
                    if owner == device:
                        tables[device, i, local] = next(free)
                        source = problem.k_cache[problem.block_table[i, j]]
                        pools[device, tables[device, i, local]] = source
        return pools, tables

    @parameterized.product(
        split=context_parallel.SPLITS, s_q=(1, 3), causal=(False, True), h_kv=(1, 2)
    )
    def test_decode(self, split, s_q, causal, h_kv):
        self.check_decode(split, s_q, causal, h_kv)

    @parameterized.parameters(
        ("interleaved", 1, 576, 260), ("interleaved", 16, 584, 17), ("contiguous", 128, 640, 3)
    )
    def test_decode_pages_and_widths(self, split, page, width, max_blocks):
        self.check_decode(split, 3, True, 1, page, width, max_blocks)

    def check_decode(self, split, s_q, causal, h_kv, page=PAGE, width=576, max_blocks=5):
        # By default 4 devices x 5 pages x 64 tokens: room for the longest.
        mesh = make_mesh((4, 2), ("context", "model"))
        lengths = [0, 1, 2, 63, 64, 65, 66, 129, 257, 258, 1000]
        problem = problems.make_problem(
            self.rng, lengths, s_q=s_q, h_q=4 * h_kv, h_kv=h_kv, page=page, width=width
        )
        pools, tables = self.spread(problem, 4, split, max_blocks)

        def body(q, pools, tables, lengths):
            return context_parallel.decode(
                q, pools[0], tables[0], lengths, axis_name="context", split=split, causal=causal
            )

        run = jax.jit(
            jax.shard_map(
                body,
                mesh=mesh,
                in_specs=(P(), P("context"), P("context"), P()),
                out_specs=(P(), P()),
            )
        )
        operands = problem.q, pools, tables, problem.cache_seqlens
        compiled = run.lower(*operands).compile()
        # Of the output in 16 bits, with the float32 lse in two more columns.
        self.assertEqual(collectives(compiled), ["all-gather"])
        size = ",".join(map(str, (*problem.q.shape[:3], 514)))
        self.assertIn(f"u16[4,{size}]", COLLECTIVES.search(compiled.as_text())[0])
        want = oracle.decode(*problem.arrays, causal=causal)
        plain = oracle.decode(*problem.arrays, causal=causal, rounded_to=problem.q.dtype)
        got = run(*operands)
        np.testing.assert_allclose(got[1], want[1], atol=1e-4, rtol=1e-5)
        error, scale = (np.abs(np.asarray(x[0], np.float64) - want[0]).max() for x in (got, plain))
        # Partial results are rounded to 16 bits before they are merged.
        self.assertLessEqual(error, 3 * scale + 2**-7 * np.abs(want[0]).max())

    @parameterized.product(split=context_parallel.SPLITS, outside=(-1, 2**31 - 1))
    def test_page_ids_outside_the_pool_read_as_zeros(self, split, outside):
        # The last page, of which some queries see a token and others do not, and one before it.
        mesh = make_mesh((8,), ("context",))
        problem = problems.make_problem(self.rng, [66, 130, 400], s_q=3, h_q=4)
        pools, tables = self.spread(problem, 8, split, max_blocks=2)
        for i, j in ((0, 1), (1, 2), (2, 3)):
            device, local = place_of(j, 8, split, max_blocks=2)
            problem.block_table[i, j] = tables[device, i, local] = outside
        got = causal_decode(mesh, split)(problem.q, pools, tables, problem.cache_seqlens)
        self.assert_close(got, oracle.decode(*problem.arrays, causal=True))

    @parameterized.parameters(*context_parallel.SPLITS)
    def test_group_axes(self, split):
        mesh = make_mesh((8,), ("context",))
        parts = [
            problems.make_problem(self.rng, lengths, s_q=3, h_q=4, h_kv=2)
            for lengths in ([66, 0, 400], [2, 257, 129])
        ]
        spread = [self.spread(part, 8, split, max_blocks=2) for part in parts]
        pools, tables = (np.stack(x, axis=1) for x in zip(*spread, strict=True))
        q, lengths = (np.stack([getattr(x, n) for x in parts]) for n in ("q", "cache_seqlens"))
        got = causal_decode(mesh, split)(q, pools, tables, lengths)
        wants = zip(*(oracle.decode(*part.arrays, causal=True) for part in parts), strict=True)
        self.assert_close(got, [np.stack(x) for x in wants])

    @parameterized.product(split=context_parallel.SPLITS, case=((1, 64, 2), (3, 64, 2), (3, 16, 6)))
    def test_append_then_decode(self, split, case):
        s_q, page, max_blocks = case
        mesh = make_mesh((8,), ("context",))
        lengths = [0, s_q, 64, 66, 129, 700]
        problem = problems.make_problem(self.rng, lengths, s_q=s_q, page=page)
        pools, tables = self.spread(problem, 8, split, max_blocks)
        new_kv = np.zeros((len(lengths), s_q, 1, 576), pools.dtype)
        for i, length in enumerate(lengths):
            for token, position in enumerate(range(length - s_q, length)):
                if position >= 0:
                    page_id = problem.block_table[i, position // page]
                    new_kv[i, token] = problem.k_cache[page_id, position % page]
        stale = pools.copy()  # without the newest rows
        stale[(stale[..., None, :] == new_kv.reshape(-1, 576)).all(-1).any(-1)] = np.nan

        @functools.partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(P(), P("context"), P("context"), P(), P()),
            out_specs=(P("context"), P(), P()),
        )
        def run(q, pools, tables, lengths, new_kv):
            where = {"axis_name": "context", "split": split}
            pool = context_parallel.append(pools[0], new_kv, tables[0], lengths, **where)
            out, lse = context_parallel.decode(q, pool, tables[0], lengths, causal=True, **where)
            return pool[None], out, lse

        pool, *got = jax.jit(run)(problem.q, stale, tables, problem.cache_seqlens, new_kv)
        support.assert_same_bits(pool, pools)
        self.assert_close(got, oracle.decode(*problem.arrays, causal=True))

    @parameterized.product(split=context_parallel.SPLITS, s_q=(1, 3))
    def test_lengths_that_no_table_has_room_for(self, split, s_q):
        mesh = make_mesh((8,), ("context",))
        room = 8 * 2 * PAGE
        problem = problems.make_problem(self.rng, [room, room, 65], s_q=s_q)
        pools, tables = self.spread(problem, 8, split, max_blocks=2)

        run = causal_decode(mesh, split)
        longer = problem.cache_seqlens + np.array([1, 1000, 0], np.int32)
        got = run(problem.q, pools, tables, longer)
        self.assert_close(got, oracle.decode(*problem.arrays, causal=True))
        least = np.iinfo(np.int32).min
        out, lse = run(problem.q, pools, tables, np.array([least, least + 5, -1], np.int32))
        self.assertFalse(np.asarray(out, np.float32).any())
        self.assertTrue(np.isneginf(lse).all())

    def test_an_unpaged_cache_is_refused(self):
        q, k_cache = (
            jnp.zeros((2, 1, 4, 576), jnp.bfloat16),
            jnp.zeros((2, 64, 1, 576), jnp.bfloat16),
        )
        message = "block_table: expected an array, since .* spread over devices in pages, got None"
        with self.assertRaisesRegex(ValueError, message):
            context_parallel.decode(q, k_cache, None, jnp.zeros(2, jnp.int32), axis_name="x")
        with self.assertRaisesRegex(ValueError, message):
            rows = jnp.zeros((2, 1, 1, 576), jnp.bfloat16)
            context_parallel.append(k_cache, rows, None, jnp.zeros(2, jnp.int32), axis_name="x")

    @parameterized.parameters(
        ({"new_kv": (2, 1, 576)}, ValueError, r"new_kv: expected shape \[b, s_q, 1, 576\]"),
        ({"new_kv": ()}, ValueError, r"new_kv: expected shape \[b, s_q, 1, 576\]"),
        ({"new_kv": (2, 1, 2, 576)}, ValueError, r"new_kv: expected shape \[b, s_q, 1, 576\]"),
        ({"new_kv": (3, 1, 1, 576)}, ValueError, r"block_table: expected shape \[3, max_blocks\]"),
        ({"dtype": jnp.float32}, TypeError, "new_kv: expected k_cache's dtype bfloat16, got"),
        (
            {"new_kv": (2, 0, 1, 576), "dtype": jnp.float32},
            TypeError,
            "new_kv: expected k_cache's dtype bfloat16, got",
        ),
        ({"q": (2, 4, 576)}, ValueError, r"q: expected shape \[\*G, b, s_q, h_q, 576\]"),
        ({"q": (576,)}, ValueError, r"q: expected shape \[\*G, b, s_q, h_q, 576\]"),
        ({"lengths": "text"}, TypeError, "cache_seqlens: expected an array, got str"),
    )
    def test_bad_input(self, change, error, message):
        pools = jnp.zeros((8, 3, 64, 1, 576), jnp.bfloat16)
        table = jnp.zeros((2, 2), jnp.int32)
        new_kv = jnp.zeros(change.get("new_kv", (2, 1, 1, 576)), change.get("dtype", pools.dtype))
        q = jnp.zeros(change.get("q", (2, 1, 4, 576)), pools.dtype)
        lengths = change.get("lengths", [1, 2])

        def body(pools):
            pool = context_parallel.append(pools[0], new_kv, table, lengths, axis_name="x")
            return context_parallel.decode(q, pool, table, lengths, axis_name="x", causal=True)

        mesh = make_mesh((8,), ("x",))
        run = jax.shard_map(body, mesh=mesh, in_specs=P("x"), out_specs=P())
        with self.assertRaisesRegex(error, message):
            jax.eval_shape(run, pools)

    def test_bad_page_size(self):
        with self.assertRaisesRegex(
            ValueError, "page_block_size: expected pages of 1, 16, .*, got 48"
        ):
            jax.eval_shape(
                jax.vmap(
                    lambda n: context_parallel.local_seqlens(
                        n, 4, axis_name="x", page_block_size=48
                    ),
                    axis_name="x",
                ),
                jnp.zeros(4, jnp.int32),
            )

    def test_bad_split(self):
        with self.assertRaisesRegex(ValueError, "split: expected one of .*got 'even'"):
            jax.eval_shape(
                jax.vmap(
                    lambda n: context_parallel.local_seqlens(n, 4, axis_name="x", split="even"),
                    axis_name="x",
                ),
                jnp.zeros(4, jnp.int32),
            )


if __name__ == "__main__":
    absltest.main()
