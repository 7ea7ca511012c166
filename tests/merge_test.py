"""merge_attention_states against attention over all keys at once."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jax_flashmla import flash_mla_with_kvcache, merge_attention_states


def attend(q, keys, seen):
    """float64: q [b, s, h, 8], keys [b, t, 8], seen [b, s, t]; out and lse."""
    scores = np.where(seen[:, :, None], np.einsum("bshd,btd->bsht", q, keys), -np.inf)
    top = scores.max(-1, keepdims=True, initial=-1e300)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    out = np.einsum("bsht,btd->bshd", weights / np.where(total > 0, total, 1), keys)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + top)[..., 0]
    return out, lse.swapaxes(1, 2)


class MergeTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.rng = np.random.default_rng()

    def draw(self, *shape):
        return self.rng.standard_normal(shape)

    @parameterized.product(parts=(1, 2, 5), as_list=(False, True), jit=(False, True))
    def test_parts_of_the_keys(self, parts, as_list, jit):
        q, keys = self.draw(3, 2, 4, 8), self.draw(3, 40, 8)
        owner = self.rng.integers(0, parts, (3, 1, 40))
        seen = self.rng.random((3, 2, 40)) < 0.7
        seen[0] = False  # a sequence without keys
        states = [attend(q, keys, seen & (owner == part)) for part in range(parts)]
        outs, lses = ([np.float32(x) for x in xs] for xs in zip(*states, strict=True))
        for out, lse in zip(outs, lses, strict=True):
            out[np.isneginf(lse.swapaxes(1, 2))] = np.nan  # must not be read
        if not as_list:
            outs, lses = np.stack(outs), np.stack(lses)
        merge = jax.jit(merge_attention_states) if jit else merge_attention_states
        out, lse = merge(outs, lses)
        want_out, want_lse = attend(q, keys, seen)
        np.testing.assert_allclose(out, want_out, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)

    def test_large_scores_do_not_overflow(self):
        outs = np.array([1.0, 3.0], np.float32).reshape(2, 1, 1, 1)
        lses = np.array([1e4, 1e4], np.float32).reshape(2, 1, 1)
        out, lse = merge_attention_states(outs, lses)
        np.testing.assert_allclose(out, 2.0)
        np.testing.assert_allclose(lse, 1e4 + np.log(2))

    def test_dtype_is_kept_and_sums_are_float32(self):
        # In bfloat16, 256 parts of 1 / 256 each would not sum up to 1.
        outs = jnp.ones((256, 1, 1, 8), jnp.bfloat16)
        out, lse = merge_attention_states(outs, jnp.zeros((256, 1, 1)))
        self.assertEqual(out.dtype, jnp.bfloat16)
        np.testing.assert_array_equal(out, 1)
        np.testing.assert_allclose(lse, np.log(256), rtol=1e-6)

    def test_decodes_of_a_shared_prefix(self):
        batch, prefix, own = 3, 128, 192
        q = self.draw(batch, 1, 16, 576).astype(jnp.bfloat16)
        pool = self.draw(2 + 3 * batch, 64, 1, 576).astype(jnp.bfloat16)
        shared = np.tile(np.arange(2, dtype=np.int32), (batch, 1))
        rest = np.arange(2, 2 + 3 * batch, dtype=np.int32).reshape(batch, 3)
        lengths = np.array([own, 65, 0], np.int32)
        states = [
            flash_mla_with_kvcache(q, pool, shared, np.full(batch, prefix, np.int32)),
            flash_mla_with_kvcache(q, pool, rest, lengths),
        ]
        out, lse = merge_attention_states(*zip(*states, strict=True))
        table = np.concatenate([shared, rest], axis=1)
        want = flash_mla_with_kvcache(q, pool, table, prefix + lengths)
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (out, want[0])), atol=1e-2)
        np.testing.assert_allclose(lse, want[1], atol=1e-4)

    @parameterized.named_parameters(
        ("rank", (2, 4, 8), (2, 4), "outs: expected shape"),
        ("lse_order", (2, 3, 1, 4, 8), (2, 3, 1, 4), r"lses: expected shape \[2, 3, 4, 1\]"),
        ("count", (2, 3, 1, 4, 8), (3, 3, 4, 1), "lses: expected shape"),
        ("none", (0, 3, 1, 4, 8), (0, 3, 4, 1), "at least one part"),
    )
    def test_bad_shapes(self, out_shape, lse_shape, message):
        with self.assertRaisesRegex(ValueError, message):
            merge_attention_states(jnp.zeros(out_shape), jnp.zeros(lse_shape))

    def test_bad_parts(self):
        with self.assertRaisesRegex(ValueError, "outs: expected parts of the same shape"):
            merge_attention_states(
                [jnp.zeros((1, 1, 8)), jnp.zeros((1, 2, 8))], jnp.zeros((2, 1, 1))
            )
        with self.assertRaisesRegex(ValueError, "lses: expected at least one part"):
            merge_attention_states(jnp.zeros((1, 1, 1, 8)), [])
        with self.assertRaisesRegex(TypeError, "lses: expected dtype float32"):
            merge_attention_states(jnp.zeros((1, 1, 1, 8)), jnp.zeros((1, 1, 1), jnp.bfloat16))


if __name__ == "__main__":
    absltest.main()
