"""Decode inside JAX's control flow and transformations."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest
from jax import lax

from jax_flashmla import flash_mla_with_kvcache, get_mla_metadata
from tests import problems


def decode(q, k_cache, block_table, cache_seqlens):
    metadata = get_mla_metadata(cache_seqlens, q.shape[-2], 1, num_sms=16)
    return flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, 512, *metadata)


class TransformsTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        problem = problems.make_problem(np.random.default_rng(), [3, 0, 200, 64])
        self.q, *self.rest = (jnp.asarray(x) for x in problem.arrays)
        self.want = decode(self.q, *self.rest)

    def assert_same(self, got, want=None):
        for a, b in zip(got, self.want if want is None else want, strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    def test_jit_and_eager(self):
        self.assert_same(jax.jit(decode)(self.q, *self.rest))

    def test_with_jit_disabled(self):
        with jax.disable_jit():
            self.assert_same(decode(self.q, *self.rest))
            # Whatever else is traced in such a context stays so.
            self.assert_same(jax.jit(decode)(self.q, *self.rest))

    def test_no_result_is_of_a_weak_type(self):
        for result in jax.tree.leaves(jax.eval_shape(decode, self.q, *self.rest)):
            self.assertFalse(result.weak_type)

    def test_numpy_operands(self):
        self.assert_same(decode(np.asarray(self.q), *(np.asarray(x) for x in self.rest)))

    def test_scan_over_layers(self):
        pools = jnp.stack([self.rest[0], self.rest[0] * 2])

        @jax.jit
        def run(q, pools):
            def layer(q, pool):
                out, lse = decode(q, pool, *self.rest[1:])
                return q.at[..., :512].set(out), lse

            return lax.scan(layer, q, pools)

        q, lses = run(self.q, pools)
        first = self.q.at[..., :512].set(self.want[0])
        want = decode(first, pools[1], *self.rest[1:])
        np.testing.assert_array_equal(lses[0], self.want[1])
        np.testing.assert_allclose(lses[1], want[1], atol=1e-2)
        self.assertEqual(q.shape, self.q.shape)

    def test_while_loop(self):
        def body(carry):
            step, _ = carry
            return step + 1, decode(self.q, *self.rest)

        zeros = jax.tree.map(jnp.zeros_like, self.want)
        _, got = jax.jit(lambda: lax.while_loop(lambda c: c[0] < 3, body, (0, zeros)))()
        self.assert_same(got)

    def test_cond(self):
        @jax.jit
        def run(use):
            zeros = jax.tree.map(jnp.zeros_like, self.want)
            return lax.cond(use, lambda: decode(self.q, *self.rest), lambda: tuple(zeros))

        self.assert_same(run(True))
        self.assert_same(run(False), [np.zeros_like(x) for x in self.want])

    def test_checkpoint(self):
        self.assert_same(jax.checkpoint(decode)(self.q, *self.rest))

    def test_eval_shape(self):
        out, lse = jax.eval_shape(decode, self.q, *self.rest)
        self.assertEqual((out.shape, out.dtype), (self.want[0].shape, self.want[0].dtype))
        self.assertEqual((lse.shape, lse.dtype), (self.want[1].shape, jnp.float32))

    def test_x64(self):
        with jax.enable_x64(True):
            out, lse = jax.jit(decode)(self.q, *self.rest)
        self.assertEqual(lse.dtype, jnp.float32)
        self.assert_same((out, lse))

    def test_jaxpr_is_readable(self):
        text = str(jax.make_jaxpr(decode)(self.q, *self.rest))
        self.assertEqual(text.count("mla_metadata["), 1)
        self.assertEqual(text.count("mla_decode["), 1)
        self.assertLess(len(text.splitlines()), 20)


if __name__ == "__main__":
    absltest.main()
