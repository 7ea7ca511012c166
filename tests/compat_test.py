"""The adapters of `jax_flashmla.compat`, against float64 and with everything else poisoned."""

import dataclasses
import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_flashmla.compat import sglang_jax, tokamax, tpu_inference
from tests import meshes, oracle, problems, support

ABSURD = problems.UNUSED_TABLE_ENTRY
ADAPTERS = {
    "sglang_jax": sglang_jax.mla_ragged_paged_attention,
    "tpu_inference": tpu_inference.mla_ragged_paged_attention,
    "tokamax": tokamax.MultiHeadLatentAttention(),
}
# (new tokens, length with them) of each sequence.
BATCHES = {
    "decode": [(1, 1), (1, 64), (1, 65), (1, 130), (1, 63), (1, 300)],
    "speculative": [(1, 63), (3, 64), (2, 65), (4, 4), (1, 300), (4, 130)],
    "prefill": [(1, 70), (65, 65), (17, 200)],
}


@dataclasses.dataclass
class Batch:
    """A batch in plain form, for the oracle, and the operands of the operators."""

    q: np.ndarray
    rows: np.ndarray  # of 640 columns, those past the 576th 0
    pool: np.ndarray
    table: np.ndarray
    lengths: np.ndarray
    cuts: np.ndarray
    operands: list

    def want(self, sm_scale=1.0, **options):
        """The pool and the output, in float64 and computed plainly."""
        rest = self.table, self.lengths, self.cuts
        pool = oracle.append_packed(self.pool, self.rows, *rest)
        outs = [
            oracle.decode_packed(
                self.q, pool, *rest, softmax_scale=sm_scale, causal=True, rounded_to=to, **options
            )
            for to in (None, self.q.dtype)
        ]
        return pool, *outs


def draw_batch(rng, name, sequences, *, page=16, h_q=8, dtype=jnp.bfloat16, spare=3):
    """What is not part of a sequence may be anything, and is: spare tokens and sequences, too."""
    counts, lengths = (np.array(x, np.int32) for x in zip(*sequences, strict=True))
    drawn = problems.make_problem(
        rng, lengths, page=page, width=640, shared_pages=10**6, dtype=dtype
    )
    cuts = np.append(0, np.cumsum(counts)).astype(np.int32)
    total = cuts[-1] + spare

    def tokens(*shape):
        x = rng.standard_normal((total, *shape), np.float32).astype(dtype)
        x[cuts[-1] :] = np.nan
        return x

    q, rows = tokens(h_q, 576), tokens(1, 640)
    rows[..., 576:] = 0
    for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
        for position in range(lengths[i] - (stop - start), lengths[i]):
            drawn.k_cache[drawn.block_table[i, position // page], position % page] = np.nan

    absurd = np.full(spare, ABSURD, np.int32)
    needed = -(-lengths // page)
    if name == "sglang_jax":
        listed = [row[:n] for row, n in zip(drawn.block_table, needed, strict=True)]
        listed = np.concatenate([*listed, np.full(5, -1, np.int32)])
        aligned = np.append(0, np.cumsum(needed * page)).astype(np.int32)
        pages, extra = listed, [np.append(aligned, absurd)]
    else:
        columns = drawn.block_table.shape[1]
        pages, extra = np.append(drawn.block_table, np.repeat(absurd, columns)), []
    decoding = int(np.argmax(np.append(counts, 0) != 1))
    count = len(lengths)
    distribution = np.array([decoding, decoding, count], np.int32)
    operands = [
        *(q[..., :512], q[..., 512:], rows[:, 0, :512], rows[:, 0, 512:576]),
        drawn.k_cache.reshape(-1, page // 2, 2, 640),
        np.append(lengths, absurd),
        pages.astype(np.int32),
        np.append(cuts, -absurd),
        *extra,
        distribution,
    ]
    return Batch(q, rows, drawn.k_cache, drawn.block_table, lengths, cuts, operands)


class CompatTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.rng = np.random.default_rng()

    def check(self, batch, got, **options):
        pool, want, plain = batch.want(**options)
        support.assert_same_bits(got[1].reshape(pool.shape), pool)
        self.assertEqual(got[0].dtype, batch.q.dtype)
        np.testing.assert_array_equal(got[0][batch.cuts[-1] :], 0)
        lse = want[1].T[..., None]  # which the operators do not return
        outs = got[0], want[0], plain[0]
        got, want, plain = ((out[:, None], lse) for out in outs)
        support.assert_decodes_well(self, got, want, plain, batch.q.dtype)

    def run_adapter(self, name, batch, **options):
        return ADAPTERS[name](*batch.operands, **options)

    @parameterized.product(name=tuple(ADAPTERS), batch=tuple(BATCHES), page=(16, 64))
    def test_batches(self, name, batch, page):
        batch = draw_batch(self.rng, name, BATCHES[batch], page=page)
        got = self.run_adapter(name, batch, sm_scale=0.06)
        self.check(batch, got, sm_scale=0.06)

    @parameterized.parameters(*ADAPTERS)
    def test_strict_promotions(self, name):
        batch = draw_batch(self.rng, name, BATCHES["speculative"])
        with support.strict_promotions():
            got = self.run_adapter(name, batch, sm_scale=0.06)
        self.check(batch, got, sm_scale=0.06)

    @parameterized.product(name=tuple(ADAPTERS), h_q=(1, 7, 128), dtype=(jnp.bfloat16, jnp.float16))
    def test_heads_and_dtypes(self, name, h_q, dtype):
        batch = draw_batch(self.rng, name, BATCHES["speculative"], h_q=h_q, dtype=dtype)
        got = self.run_adapter(name, batch, sm_scale=0.04)
        self.check(batch, got, sm_scale=0.04)

    @parameterized.parameters(*ADAPTERS)
    def test_windows_caps_and_scales(self, name):
        batch = draw_batch(self.rng, name, BATCHES["speculative"])
        options = dict(sliding_window=40, soft_cap=20.0, mask_value=-1e9)
        got = self.run_adapter(name, batch, sm_scale=0.1, q_scale=0.5, k_scale=1.5, **options)
        self.check(batch, got, sm_scale=0.1 * 0.5 * 1.5, sliding_window=40, logits_soft_cap=20.0)
        doubled = self.run_adapter(
            name, batch, sm_scale=0.1, q_scale=0.5, k_scale=1.5, v_scale=2.0, **options
        )
        support.assert_same_bits(doubled[0], 2 * got[0])

    @parameterized.parameters(4, 6)
    def test_a_bound_on_the_new_tokens(self, most):
        batch = draw_batch(self.rng, "sglang_jax", BATCHES["speculative"])
        options = dict(sm_scale=0.05, sliding_window=50)
        got = self.run_adapter("sglang_jax", batch, mixed_static_q_len=most, **options)
        self.check(batch, got, **options)

    @parameterized.parameters(*ADAPTERS)
    def test_no_sequence(self, name):
        batch = draw_batch(self.rng, name, BATCHES["decode"])
        batch.operands[-1] = np.zeros(3, np.int32)
        out, cache = self.run_adapter(name, batch)
        np.testing.assert_array_equal(out, 0)
        support.assert_same_bits(cache, batch.operands[4])

    @parameterized.product(name=tuple(ADAPTERS), most=(None, 2))
    def test_no_token(self, name, most):
        options = {} if most is None or name != "sglang_jax" else {"mixed_static_q_len": most}
        batch = draw_batch(self.rng, name, BATCHES["decode"])
        operands = [x[:0] if i < 4 else x for i, x in enumerate(batch.operands)]
        out, cache = jax.jit(functools.partial(ADAPTERS[name], **options))(*operands)
        self.assertEqual(out.shape, (0, *batch.operands[0].shape[1:]))
        support.assert_same_bits(cache, batch.operands[4])

    @parameterized.parameters(*ADAPTERS)
    def test_tuning_makes_no_difference(self, name):
        batch = draw_batch(self.rng, name, BATCHES["speculative"])
        if name == "tokamax":
            tuning = dict(s_dtype=jnp.float32)
        else:
            tuning = dict(
                chunk_prefill_size=256,
                num_kv_pages_per_block=(4, 1, 8),
                num_queries_per_block=4,
                vmem_limit_bytes=2**26,
                decode_batch_size=2,
            )
        want = self.run_adapter(name, batch)
        got = self.run_adapter(name, batch, **tuning)
        for x, y in zip(got, want, strict=True):
            support.assert_same_bits(x, y)

    @parameterized.parameters(*ADAPTERS)
    def test_inside_jit_the_cache_is_not_copied(self, name):
        support.skip_if_scatters_copy(self)
        batch = draw_batch(self.rng, name, BATCHES["speculative"])
        operands = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in batch.operands]
        operands[4] = jax.ShapeDtypeStruct((2000, 8, 2, 640), batch.q.dtype)
        fun = jax.jit(lambda *x: ADAPTERS[name](*x), donate_argnums=4)
        memory = fun.lower(*operands).compile().memory_analysis()
        self.assertEqual(memory.alias_size_in_bytes, 2000 * 16 * 640 * 2)
        self.assertLess(memory.temp_size_in_bytes, 2000 * 16 * 640 * 2 / 4)

    @parameterized.parameters("sglang_jax", "tpu_inference")
    def test_the_cache_is_donated(self, name):
        support.skip_if_scatters_copy(self)
        batch = draw_batch(self.rng, name, BATCHES["decode"])
        operands = [jnp.array(x) for x in batch.operands]
        ADAPTERS[name](*operands)
        self.assertTrue(operands[4].is_deleted())

    def test_names_of_arguments(self):
        operands = ["ql_nope", "q_pe", "new_kv_c", "new_k_pe", "cache_kv", "kv_lens"]
        operands += ["page_indices", "cu_q_lens", "distribution"]
        for name, function in ADAPTERS.items():
            names = list(inspect.signature(function).parameters)
            want = list(operands)
            if name == "sglang_jax":
                want.insert(8, "cu_kv_lens")
            self.assertEqual(names[: len(want)], want)
            self.assertEqual(names[len(want)], "sm_scale")


class ShardingTest(meshes.MeshTest):
    @parameterized.product(
        name=tuple(ADAPTERS), how=(AxisType.Auto, AxisType.Explicit, AxisType.Manual)
    )
    def test_heads(self, name, how):
        batch = draw_batch(self.rng, name, BATCHES["speculative"], h_q=16)
        pool, want, _ = batch.want()
        axis_type = AxisType.Auto if how is AxisType.Manual else how
        mesh = meshes.make_mesh((8,), ("model",), axis_type)
        heads = P(None, "model")
        specs = heads, heads, *[P()] * (len(batch.operands) - 2)
        fun = ADAPTERS[name]
        if how is AxisType.Manual:
            fun = jax.shard_map(fun, mesh=mesh, in_specs=specs, out_specs=(heads, P()))
        with jax.set_mesh(mesh):
            operands = meshes.put(mesh, batch.operands, specs)
            compiled = jax.jit(lambda *x: fun(*x)).lower(*operands).compile()
            out, cache = compiled(*operands)
        self.assertEqual(meshes.collectives(compiled), [])
        self.assertEqual(out.sharding.spec[1], "model")
        support.assert_same_bits(cache.reshape(pool.shape), pool)
        np.testing.assert_allclose(np.asarray(out, np.float32), want[0], atol=5e-2)


class ErrorsTest(parameterized.TestCase):
    @parameterized.product(
        name=tuple(ADAPTERS),
        case=(
            (0, (6, 4, 512), "float8_e4m3fn", TypeError, "ql_nope: expected dtype bfloat16 or"),
            (0, (6, 4, 448), None, ValueError, r"ql_nope: expected shape \[6, 4, 512\], got"),
            (
                0,
                (4, 6, 512),
                None,
                ValueError,
                r"q_pe: expected shape \[4, 6, 64\] \(T and h_q as ql_n",
            ),
            (0, (6, 0, 512), None, ValueError, "ql_nope: expected at least one head, got h_q 0"),
            (4, (0, 8, 2, 640), None, ValueError, "cache_kv: expected at least one page, got pa"),
            (1, (6, 4, 128), None, ValueError, r"q_pe: expected shape \[6, 4, 64\]"),
            (2, (5, 512), None, ValueError, r"new_kv_c: expected shape \[6, 512\] \(T as ql_nope"),
            (3, (6, 64), "float16", TypeError, "new_k_pe: expected ql_nope's dtype bfloat16, got"),
            (4, (9, 8, 2, 576), None, ValueError, r"cache_kv: .*packing, 640\], got \[9, 8, 2, 57"),
            (4, (9, 8, 4, 640), "float8_e4m3fn", TypeError, "cache_kv: expected ql_nope's dtype"),
            (4, (9, 8, 4, 656), "uint8", TypeError, "cache_kv: expected ql_nope's dtype bfloat16"),
            (4, (9, 8, 4, 640), "float8_e5m2", TypeError, "cache_kv: expected ql_nope's dtype"),
            (4, (9, 4, 2, 640), None, ValueError, "cache_kv: expected pages of 1, 16, .*got 8"),
            (4, (9, 640, 16), None, ValueError, "cache_kv: expected shape"),
            (5, (3, 1), None, ValueError, r"kv_lens: expected shape \[n\], got \[3, 1\]"),
            (5, (0,), None, ValueError, r"kv_lens: expected room for at least one sequence"),
            (6, (3, 2), None, ValueError, r"page_indices: expected shape \[num_page_indices\]"),
            (7, (3,), None, ValueError, r"cu_q_lens: expected shape \[4\], got \[3\]"),
            (7, (4,), "uint32", TypeError, "cu_q_lens: expected dtype int32, got uint32"),
            (-1, (2,), None, ValueError, r"distribution: expected shape \[3\], got \[2\]"),
        ),
    )
    def test_operands(self, name, case):
        index, shape, dtype, error, message = case
        operands = self.operands(name)
        operands[index] = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype or operands[index].dtype))
        with self.assertRaisesRegex(error, message):
            jax.eval_shape(ADAPTERS[name], *operands)

    def operands(self, name):
        shapes = [(6, 4, 512), (6, 4, 64), (6, 512), (6, 64), (9, 8, 2, 640)]
        counts = [(3,), (12,), (4,), *([(4,)] if name == "sglang_jax" else []), (3,)]
        return [
            *(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes),
            *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in counts),
        ]

    @parameterized.product(
        name=tuple(ADAPTERS),
        case=(
            (dict(debug_mode=True), ValueError, "debug_mode: expected False, got True"),
            (dict(mask_value=0.0), ValueError, "mask_value: expected None or at most -10000"),
            (dict(mask_value="-inf"), TypeError, "mask_value: expected a static Python float"),
            (
                dict(sm_scale=1e30, k_scale=1e30),
                ValueError,
                "sm_scale: expected a finite number, in float32 too, with q_scale and k_scale",
            ),
            (dict(soft_cap=0.0), ValueError, "soft_cap: expected a positive number, got 0.0"),
            (dict(sliding_window=0), ValueError, "sliding_window: expected a positive integer"),
            (dict(k_scale=float("nan")), ValueError, "k_scale: expected a finite number"),
        ),
    )
    def test_options(self, name, case):
        options, error, message = case
        with self.assertRaisesRegex(error, message):
            jax.eval_shape(lambda *x: ADAPTERS[name](*x, **options), *self.operands(name))

    def test_others(self):
        def check(name, error, message, change=None, **options):
            operands = self.operands(name)
            if change is not None:
                index, shape = change
                operands[index] = jax.ShapeDtypeStruct(shape, jnp.int32)
            with self.assertRaisesRegex(error, message):
                jax.eval_shape(lambda *x: ADAPTERS[name](*x, **options), *operands)

        message = "return_residuals: expected False, got True"
        check("tokamax", ValueError, message, return_residuals=True)
        message = "page_indices: expected a positive multiple of 3 entries .* got 11"
        check("tokamax", ValueError, message, (6, (11,)))
        check("tpu_inference", ValueError, message, (6, (11,)))
        message = r"cu_kv_lens: expected shape \[4\] \(as cu_q_lens's\), got \[3\]"
        check("sglang_jax", ValueError, message, (8, (3,)))
        message = "mixed_static_q_len: expected a positive integer, got 0"
        check("sglang_jax", ValueError, message, mixed_static_q_len=0)


if __name__ == "__main__":
    absltest.main()
