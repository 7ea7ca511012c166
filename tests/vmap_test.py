"""vmap of decode against a loop, for every choice of mapped operands, and nested."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jax_flashmla import flash_mla_with_kvcache, get_mla_metadata
from tests import problems

OPERANDS = ("q", "k_cache", "block_table", "cache_seqlens")
MAPPED = [m for m in itertools.product((False, True), repeat=4) if any(m)]
SIZE = 3


def decode(q, k_cache, block_table, cache_seqlens):
    return flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, causal=True)


def plan_and_decode(q, k_cache, block_table, cache_seqlens):
    metadata = get_mla_metadata(cache_seqlens, 8, 2, num_sms=8)
    return flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, 512, *metadata, causal=True
    )


def make_examples(rng, mapped, axes=(0, 0, 0, 0)):
    """Operands, each with a mapped axis or not, and in_axes. Poison is where any example allows."""
    stacked = problems.stack(
        [problems.make_problem(rng, [0, 70, 300, 129], s_q=2, h_q=8, h_kv=2) for _ in range(SIZE)]
    ).arrays
    # Every example must be valid with every other's operands: no NaN page may be in reach.
    stacked = [np.nan_to_num(x.astype(np.float32)).astype(x.dtype) for x in stacked[:2]] + [
        np.minimum(stacked[2], stacked[1].shape[1] - 1),
        np.stack([rng.permutation(x) for x in stacked[3]]),
    ]
    in_axes = tuple(axis if m else None for axis, m in zip(axes, mapped, strict=True))
    args = [
        jnp.asarray(x[0] if axis is None else np.moveaxis(x, 0, axis))
        for x, axis in zip(stacked, in_axes, strict=True)
    ]
    return args, in_axes


def loop(fun, args, in_axes):
    """What vmap means: one call per example."""
    outs = []
    for i in range(SIZE):
        example = [
            x if axis is None else jnp.take(x, i, axis=axis)
            for x, axis in zip(args, in_axes, strict=True)
        ]
        outs.append(fun(*example))
    return [jnp.stack(x) for x in zip(*outs, strict=True)]


class VmapTest(parameterized.TestCase):
    def assert_same(self, got, want):
        for a, b in zip(got, want, strict=True):
            self.assertEqual(a.dtype, b.dtype)
            a, b = (np.asarray(x, np.float32) for x in (a, b))
            np.testing.assert_allclose(a, b, atol=1e-2, rtol=1e-2)

    @parameterized.product(mapped=MAPPED, fun=(decode, plan_and_decode))
    def test_in_axes(self, mapped, fun):
        args, in_axes = make_examples(np.random.default_rng(), mapped)
        want = loop(fun, args, in_axes)
        self.assert_same(jax.vmap(fun, in_axes)(*args), want)
        self.assert_same(jax.jit(jax.vmap(fun, in_axes))(*args), want)

    @parameterized.parameters(((2, 1, 1, 1),), ((-1, -1, -1, -1),), ((4, 4, 2, 0),))
    def test_axes_other_than_the_first(self, axes):
        args, in_axes = make_examples(np.random.default_rng(), (True,) * 4, axes)
        self.assert_same(
            jax.vmap(jax.jit(plan_and_decode), in_axes)(*args),
            loop(plan_and_decode, args, in_axes),
        )

    def test_out_axes(self):
        args, in_axes = make_examples(np.random.default_rng(), (True, False, True, True))
        want = loop(decode, args, in_axes)
        got = jax.vmap(decode, in_axes, out_axes=(1, -1))(*args)
        self.assert_same(got, [jnp.moveaxis(want[0], 0, 1), jnp.moveaxis(want[1], 0, -1)])

    def test_queries_as_a_pair(self):
        args, in_axes = make_examples(np.random.default_rng(), (True, True, True, False))
        pair = (args[0][..., :512], args[0][..., 512:])
        got = jax.vmap(decode, ((0, 0), *in_axes[1:]))(pair, *args[1:])
        self.assert_same(got, loop(decode, args, in_axes))

    @parameterized.product(outer=MAPPED[::3], inner=MAPPED[::4])
    def test_nested(self, outer, inner):
        rng = np.random.default_rng()
        inner_args, inner_axes = make_examples(rng, inner)
        outer_axes = tuple(0 if m else None for m in outer)
        args = [jnp.stack([x, x[::-1]]) if m else x for x, m in zip(inner_args, outer, strict=True)]
        got = jax.vmap(jax.vmap(decode, inner_axes), outer_axes)(*args)
        for i in range(2):
            example = [x[i] if m else x for x, m in zip(args, outer, strict=True)]
            self.assert_same([x[i] for x in got], loop(decode, example, inner_axes))

    @parameterized.product(mapped=[m for m in itertools.product((False, True), repeat=3) if any(m)])
    def test_unpaged_cache(self, mapped):
        rng = np.random.default_rng()
        lengths = [0, 70, 80, 64]
        stacked = problems.stack(
            [
                problems.make_unpaged_problem(rng, lengths, 80, s_q=2, h_q=8, h_kv=2, width=640)
                for _ in range(SIZE)
            ]
        )
        if mapped[2]:  # every example must be valid with every other's lengths
            stacked.cache_seqlens = np.stack([rng.permutation(lengths) for _ in range(SIZE)])
            stacked.k_cache = np.nan_to_num(stacked.k_cache.astype(np.float32)).astype(jnp.bfloat16)
        operands = stacked.q, stacked.k_cache, stacked.cache_seqlens
        args = [jnp.asarray(x if m else x[0]) for x, m in zip(operands, mapped, strict=True)]
        in_axes = tuple(0 if m else None for m in mapped)

        def unpaged(q, k_cache, cache_seqlens):
            return plan_and_decode(q, k_cache, None, cache_seqlens)

        want = loop(unpaged, args, in_axes)
        self.assert_same(jax.jit(jax.vmap(unpaged, in_axes))(*args), want)
        jaxpr = jax.make_jaxpr(jax.vmap(unpaged, in_axes))(*args).jaxpr
        users = [e.primitive.name for e in jaxpr.eqns if jaxpr.invars[1] in e.invars]
        self.assertEqual(users, ["mla_decode"])

    def test_pool_with_group_axes(self):
        rng = np.random.default_rng()
        args, _ = make_examples(rng, (True,) * 4)
        grouped = decode(*args)  # the mapped axis is a group axis already
        more = [jnp.stack([args[0], args[0] * 2]), *args[1:]]
        got = jax.vmap(decode, (0, None, None, None))(*more)
        self.assert_same([x[0] for x in got], grouped)
        self.assert_same([x[1] for x in got], decode(args[0] * 2, *args[1:]))

    def test_a_pool_is_not_copied_to_move_its_axis(self):
        # Two axes of groups, of which the second is mapped, in one step or in two.
        rng = np.random.default_rng()
        (args, _), (more, _) = (make_examples(rng, (True,) * 4) for _ in range(2))
        grouped = [jnp.stack([x, y], 1) for x, y in zip(args, more, strict=True)]
        want = decode(*grouped)
        for out_axes, fun in (
            (1, jax.vmap(decode, in_axes=1, out_axes=1)),
            (0, jax.vmap(jax.vmap(decode, in_axes=0), in_axes=1)),
        ):
            pool = (jaxpr := jax.make_jaxpr(fun)(*grouped).jaxpr).invars[1]
            users = [eqn.primitive.name for eqn in jaxpr.eqns if pool in eqn.invars]
            self.assertEqual(users, ["mla_decode"])
            self.assert_same([jnp.moveaxis(x, out_axes, 1) for x in fun(*grouped)], want)

    def test_never_copies_a_shared_pool(self):
        args, _ = make_examples(np.random.default_rng(), (True, False, True, True))
        jaxpr = jax.make_jaxpr(jax.vmap(decode, (0, None, 0, 0)))(*args)
        pool = jaxpr.jaxpr.invars[1]
        users = [eqn for eqn in jaxpr.jaxpr.eqns if pool in eqn.invars]
        self.assertEqual([eqn.primitive.name for eqn in users], ["mla_decode"])

    def test_a_size_of_zero(self):
        args, in_axes = make_examples(np.random.default_rng(), (True, False, True, True))
        args = [x if axis is None else x[:0] for x, axis in zip(args, in_axes, strict=True)]
        out, lse = jax.vmap(decode, in_axes)(*args)
        self.assertEqual(out.shape, (0, 4, 2, 8, 512))
        self.assertEqual(lse.shape, (0, 4, 8, 2))


if __name__ == "__main__":
    absltest.main()
