"""The decode kernel on every combination of sizes that kernels get wrong, launched directly.

Direct launches compile nothing, so that the full product fits a test run, and write into buffers
that were poisoned: an element that is not written, or partial results that are read where none
were written, show as NaN.
"""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jax_flashmla import get_mla_metadata, native
from jax_flashmla.cache_layout import PAGE_SIZES
from jax_flashmla.decode_local import partial_types
from tests import problems, support

HEADS = (1, 3, 9, 63, 64, 126, 128)
# Heads of a KV head are padded to so many for the reference, so that few shapes are compiled.
PADDED_HEADS = {1: 128, 2: 64, 3: 42, 8: 16}
SCALE = 1 / 24  # what direct launches use


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def plan(cache_seqlens, rows, h_kv, num_sms=132):
    return get_mla_metadata(cache_seqlens, rows, h_kv, num_sms=num_sms)


@jax.jit
def reference(arrays, causal):
    """float32, and the same with 16-bit weights and results."""
    exact = support.decode_in_low_precision(arrays, SCALE, causal, weights_dtype=jnp.float32)
    plain = support.decode_in_low_precision(arrays, SCALE, causal)
    return exact, plain


def poisoned(shape, dtype=jnp.float32):
    return jnp.full(shape, jnp.nan, dtype)


def launch(arrays, metadata, h_kv, causal, **options):
    """Runs the kernels once, or as `options` say; returns out, lse and microseconds."""
    q, k_cache, table, _ = arrays
    batch, s_q, h_q, _ = q.shape
    parts = metadata.tile_scheduler_metadata.shape[0]
    rows = s_q * h_q // h_kv
    slots = batch + parts
    out = poisoned((batch, s_q, h_q, 512), q.dtype)
    lse = poisoned((batch, h_q, s_q))
    workspace = [poisoned(x.shape, x.dtype) for x in partial_types((slots, h_kv), rows)]
    operands = jax.block_until_ready((*arrays, *metadata, out, lse, *workspace))
    microseconds = native.module.bench.time_decode(
        [x.unsafe_buffer_pointer() for x in operands],
        batch=batch,
        s_q=s_q,
        h_q=h_q,
        h_kv=h_kv,
        num_blocks=k_cache.shape[0],
        page_tokens=k_cache.shape[1],
        key_stride=k_cache.shape[3],
        max_blocks=table.shape[1],
        num_parts=parts,
        slots=slots,
        causal=causal,
        **({"what": "decode", "launches": 1, "replays": 1} | options),
    )
    return np.asarray(out), np.asarray(lse), microseconds


def assert_same_results(first, again):
    """Of two launches: the same out and lse, to the bit."""
    for x, y in zip(first[:2], again[:2], strict=True):
        np.testing.assert_array_equal(x, y)


class DecodeMatrixTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        support.need_kernel(self, "decode")
        self.rng = np.random.default_rng()

    @parameterized.product(
        batch=(1, 2, 6, 64), s_q=(1, 2, 4), keys=(20, 140, 4096), h_kv=(1, 2, 3, 8)
    )
    def test_full_product(self, batch, s_q, keys, h_kv):
        max_blocks = -(-keys // 64) + 3
        for varied in (False, True):
            lengths = self.rng.integers(0, keys + 1, batch) if varied else np.full(batch, keys)
            problem = problems.make_problem(
                self.rng, lengths, s_q=s_q, h_kv=h_kv, h_q=h_kv, max_blocks=max_blocks
            )
            shared = [jnp.asarray(x) for x in problem.arrays[1:]]
            for h_q in (h for h in HEADS if h % h_kv == 0):
                self.check_heads(shared, s_q, h_q, h_kv)

    @parameterized.product(page=PAGE_SIZES, width=(576, 584, 640), s_q=(1, 3), h_kv=(1, 2))
    def test_page_sizes_and_widths(self, page, width, s_q, h_kv):
        lengths = [0, 1, page - 1, page, page + 1, 63, 64, 65, 3 * page + 70, 3000]
        problem = problems.make_problem(
            self.rng, lengths, s_q=s_q, h_kv=h_kv, h_q=h_kv, page=page, width=width
        )
        shared = [jnp.asarray(x) for x in problem.arrays[1:]]
        for h_q in (h for h in HEADS if h % h_kv == 0):
            self.check_heads(shared, s_q, h_q, h_kv)

    def check_heads(self, shared, s_q, h_q, h_kv):
        batch = shared[-1].shape[0]
        heads_per_kv, padded = h_q // h_kv, PADDED_HEADS[h_kv]
        draw = self.rng.standard_normal((batch, s_q, h_kv, padded, 576), np.float32)
        all_q = jnp.asarray(draw.astype(jnp.bfloat16))
        q = all_q[:, :, :, :heads_per_kv].reshape(batch, s_q, h_q, 576)
        metadata = plan(shared[-1], s_q * heads_per_kv, h_kv)
        all_q = all_q.reshape(batch, s_q, h_kv * padded, 576)
        for causal in (False, True):
            with self.subTest(h_q=h_q, causal=causal):
                want, plain = reference((all_q, *shared), causal)
                got = launch((q, *shared), metadata, h_kv, causal)[:2]
                support.assert_decodes_well(
                    self,
                    got,
                    select_heads(want, h_kv, padded, heads_per_kv),
                    select_heads(plain, h_kv, padded, heads_per_kv),
                    q.dtype,
                )

    @parameterized.parameters((64, 4, 20, 126), (512, 1, 20, 16), (256, 2, 64, 64))
    def test_the_same_bits_for_many_short_sequences(self, batch, s_q, keys, h_q):
        # Several sequences of one block for each thread block: buffers change hands at once.
        problem = problems.make_problem(self.rng, np.full(batch, keys), s_q=s_q, h_q=h_q)
        arrays = [jnp.asarray(x) for x in problem.arrays]
        metadata = plan(arrays[-1], s_q * h_q, 1)
        first = launch(arrays, metadata, 1, True)
        for _ in range(100):
            assert_same_results(first, launch(arrays, metadata, 1, True))

    def test_the_same_bits_while_another_stream_is_busy(self):
        lengths = self.rng.integers(0, 5000, 48)
        problem = problems.make_problem(self.rng, lengths, s_q=2, h_q=128)
        arrays = [jnp.asarray(x) for x in problem.arrays]
        metadata = plan(arrays[-1], 256, 1)
        first = launch(arrays, metadata, 1, True)
        # Another thread decodes on a stream of its own, many times in one call.
        other = threading.Thread(
            target=launch,
            args=(arrays, metadata, 1, True),
            kwargs={"launches": 100, "replays": 100},
        )
        other.start()
        while_busy = 0
        for _ in range(20):
            again = launch(arrays, metadata, 1, True)
            while_busy += other.is_alive()
            assert_same_results(first, again)
        other.join()
        self.assertGreater(while_busy, 10)


def select_heads(result, h_kv, padded, heads_per_kv):
    """The heads that the kernel computed, of a reference with padded ones."""
    out, lse = (np.asarray(x) for x in result)
    batch, s_q = out.shape[:2]
    out = out.reshape(batch, s_q, h_kv, padded, 512)[:, :, :, :heads_per_kv]
    lse = lse.reshape(batch, h_kv, padded, s_q)[:, :, :heads_per_kv]
    return out.reshape(batch, s_q, -1, 512), lse.reshape(batch, -1, s_q)


if __name__ == "__main__":
    absltest.main()
