"""Every message: the argument's name, what was expected, what came."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jax_flashmla import flash_mla_with_kvcache, get_mla_metadata, native, show_config

BF16 = jnp.bfloat16


def zeros(shape, dtype=BF16):
    return jnp.zeros(shape, dtype)


def ints(shape):
    return zeros(shape, jnp.int32)


VALID = {
    "q": zeros((2, 1, 4, 576)),
    "k_cache": zeros((3, 64, 2, 576)),
    "block_table": ints((2, 5)),
    "cache_seqlens": ints((2,)),
}
PLAN = {"tile_scheduler_metadata": ints((132, 8)), "num_splits": ints((3,))}
Q_PAIR = (zeros((2, 1, 4, 512)), zeros((2, 1, 4, 64)))
GROUPED = {
    "q": zeros((7, 2, 1, 4, 576)),
    "k_cache": zeros((7, 3, 64, 2, 576)),
    "block_table": ints((7, 2, 5)),
    "cache_seqlens": ints((7, 2)),
}
UNPAGED = {"k_cache": zeros((2, 80, 2, 576)), "block_table": None}

DECODE_ERRORS = [
    # q
    (dict(q="text"), TypeError, "q: expected an array, got str"),
    (dict(q=zeros((2, 4, 576))), ValueError, r"q: expected shape \[\*G, b, s_q, h_q, 576\], got"),
    (dict(q=zeros((2, 1, 4, 512))), ValueError, r"q: expected shape \[2, 1, 4, 576\], got .*512"),
    (
        dict(q=zeros((2, 1, 4, 576), jnp.float32)),
        TypeError,
        "q: expected dtype bfloat16 or float16",
    ),
    (dict(q=zeros((2, 0, 4, 576))), ValueError, "q: expected at least one query token, got s_q 0"),
    (dict(q=zeros((2, 1, 3, 576))), ValueError, "multiple of k_cache's h_kv, got h_q 3 and h_kv 2"),
    (dict(q=zeros((2, 1, 0, 576))), ValueError, "multiple of k_cache's h_kv, got h_q 0 and h_kv 2"),
    (dict(q=(*Q_PAIR, Q_PAIR[0])), ValueError, r"a pair \(q_nope, q_rope\), got 3 items"),
    (dict(q=Q_PAIR[::-1]), ValueError, r"q_nope: expected shape \[2, 1, 4, 512\], got .*64"),
    (
        dict(q=(Q_PAIR[0], Q_PAIR[1][:1])),
        ValueError,
        r"q_rope: expected shape \[2, 1, 4, 64\] \(as",
    ),
    (
        dict(q=(Q_PAIR[0], zeros((2, 1, 4, 64), jnp.float16))),
        TypeError,
        "q_rope: expected q_nope's",
    ),
    # k_cache
    (
        dict(k_cache=zeros((3, 64, 2, 576), jnp.float16)),
        TypeError,
        "k_cache: expected q's dtype bf",
    ),
    (
        dict(k_cache=zeros((3, 64, 576))),
        ValueError,
        r"k_cache: expected shape \[num_blocks, page_block_size, h_kv, width\], got \[3, 64, 576\]",
    ),
    *[
        (
            dict(k_cache=zeros((3, page, 2, 576))),
            ValueError,
            f"k_cache: expected pages of 1, 16, 32, 64, 128, 256, 512 or 1024 tokens, got {page}$",
        )
        for page in (0, 8, 48, 2048)
    ],
    *[
        (
            dict(k_cache=zeros((3, 64, 2, width))),
            ValueError,
            f"k_cache: expected rows of 576 columns.*a multiple of 8, got width {width}$",
        )
        for width in (512, 570, 577)
    ],
    (dict(k_cache=zeros((0, 64, 2, 576))), ValueError, "k_cache: expected at least one page"),
    (dict(k_cache=zeros((3, 64, 0, 576))), ValueError, "got h_q 4 and h_kv 0"),
    # an unpaged k_cache
    (
        UNPAGED | dict(k_cache=zeros((3, 80, 2, 576))),
        ValueError,
        r"k_cache: expected shape \[2, max_len, h_kv, width\] \(b as q's\), got \[3, 80, 2, 576\]",
    ),
    (
        UNPAGED | dict(k_cache=zeros((2, 80, 576))),
        ValueError,
        r"k_cache: expected shape \[2, max_len, h_kv, width\] \(b as q's\), got \[2, 80, 576\]",
    ),
    (
        UNPAGED | dict(k_cache=zeros((2, 0, 2, 576))),
        ValueError,
        "k_cache: expected room for at least one token, got max_len 0",
    ),
    (UNPAGED | dict(k_cache=zeros((2, 80, 2, 570))), ValueError, "k_cache: .* got width 570"),
    (UNPAGED | dict(cache_seqlens=ints((3,))), ValueError, r"cache_seqlens: .* \[2\] .* \[3\]"),
    (
        GROUPED | dict(block_table=None),
        ValueError,
        r"k_cache: expected shape \[7, 2, .* \(group axes \[7\] and b as q's\), got \[7, 3,",
    ),
    # block_table, cache_seqlens
    (dict(block_table=zeros((2, 5), jnp.float32)), TypeError, "block_table: expected dtype int32"),
    (dict(block_table=ints((3, 5))), ValueError, r"block_table: expected shape \[2, max_blocks\]"),
    (dict(block_table=ints((2,))), ValueError, r"block_table: expected shape \[2, max_blocks\]"),
    (dict(block_table=ints((2, 0))), ValueError, "block_table: expected at least one column"),
    (
        dict(cache_seqlens=ints((3,))),
        ValueError,
        r"cache_seqlens: expected shape \[2\] .*got \[3\]",
    ),
    (dict(cache_seqlens=zeros((2,), jnp.uint32)), TypeError, "cache_seqlens: expected dtype int32"),
    # groups
    (
        GROUPED | dict(q=zeros((6, 2, 1, 4, 576))),
        ValueError,
        r"k_cache: .*\[6, num_blocks, .*group",
    ),
    (GROUPED | dict(block_table=ints((2, 5))), ValueError, r"block_table: .*\[7, 2, max_blocks\]"),
    (
        GROUPED | dict(cache_seqlens=ints((2,))),
        ValueError,
        r"cache_seqlens: expected shape \[7, 2\]",
    ),
    # metadata
    (dict(num_splits=ints((3,))), ValueError, "tile_scheduler_metadata: expected an array, since"),
    (
        dict(tile_scheduler_metadata=ints((4, 8))),
        ValueError,
        "num_splits: expected an array, since",
    ),
    (
        PLAN | dict(num_splits=ints((2,))),
        ValueError,
        r"num_splits: expected shape \[3\] \(b \+ 1\)",
    ),
    (
        PLAN | dict(num_splits=zeros((3,))),
        TypeError,
        "num_splits: expected dtype int32, got bfloat",
    ),
    (
        PLAN | dict(tile_scheduler_metadata=ints((4, 5))),
        ValueError,
        r"tile_scheduler_metadata: expected shape \[num_sm_parts, 8\], got \[4, 5\]",
    ),
    (
        PLAN | dict(tile_scheduler_metadata=zeros((4, 8))),
        TypeError,
        "tile_scheduler_metadata: expected dtype int32",
    ),
    (
        dict(tile_scheduler_metadata=ints((0, 8)), num_splits=ints((3,))),
        ValueError,
        "tile_scheduler_metadata: expected at least one partition, got num_sm_parts 0",
    ),
    # numbers that do not fit int32, and would name another page
    (
        dict(block_table=np.array([[2**32 + 1, 0], [1, 2]])),
        ValueError,
        "block_table: expected numbers of 32 bits, got 4294967297",
    ),
    (
        dict(cache_seqlens=np.array([5, -(2**31) - 1])),
        ValueError,
        "cache_seqlens: expected numbers of 32 bits, got -2147483649",
    ),
    (dict(cache_seqlens=[2**31, 5]), ValueError, "cache_seqlens: .* 32 bits, got 2147483648"),
    (dict(cache_seqlens=[2**70, 5]), ValueError, "cache_seqlens: .* 32 bits, got 11805916207"),
    (dict(cache_seqlens=[0.5, 5]), TypeError, "cache_seqlens: expected dtype int32, got float32"),
    (
        dict(block_table=ints((2, 2**24))),
        ValueError,
        r"block_table: expected room for less than 2\*\*30 tokens in a row, got .* 16777216 of 64",
    ),
    # static
    (dict(head_dim_v=256), ValueError, "head_dim_v: expected 512, got 256"),
    (dict(head_dim_v="512"), TypeError, "head_dim_v: expected a static Python integer, got str"),
    (dict(softmax_scale="1"), TypeError, "softmax_scale: expected a static Python float, got str"),
    (dict(softmax_scale=float("nan")), ValueError, "softmax_scale: expected a finite number"),
    (dict(softmax_scale=1e39), ValueError, r"softmax_scale: .* in float32 too, got 1e\+39"),
    (dict(softmax_scale=10**400), ValueError, "softmax_scale: expected a finite number"),
    (dict(causal=1), TypeError, "causal: expected a static Python bool, got int 1"),
    (dict(implementation="triton"), ValueError, 'expected None, "cuda" or "xla", got \'triton\''),
]

LENGTHS = ints((4,))
PLAN_ERRORS = [
    ((zeros((4,)), 16, 1), {}, TypeError, "cache_seqlens: expected dtype int32, got bfloat16"),
    ((ints(()), 16, 1), {}, ValueError, r"cache_seqlens: expected shape \[\*G, b\], got a scalar"),
    (
        (LENGTHS, 0, 1),
        {},
        ValueError,
        "num_q_tokens_per_head_k: expected a positive integer, got 0",
    ),
    ((LENGTHS, 1.5, 1), {}, TypeError, "num_q_tokens_per_head_k: expected a static Python integer"),
    ((LENGTHS, 16, True), {}, TypeError, "num_heads_k: expected a static Python integer, got bool"),
    (
        (LENGTHS, 16, 1),
        dict(is_fp8_kvcache=1),
        TypeError,
        "is_fp8_kvcache: expected a static Python bool, got int",
    ),
    (
        (LENGTHS, 16, 1),
        dict(num_sms=-3),
        ValueError,
        "num_sms: expected a positive integer, got -3",
    ),
    ((LENGTHS, 16, 1), dict(num_sms=10**6), ValueError, "num_sms: expected at most 65535, got 10"),
    (
        (LENGTHS, 16, 1),
        dict(implementation="gpu"),
        ValueError,
        'implementation: expected None, "cu',
    ),
]


class ErrorsTest(parameterized.TestCase):
    def test_the_valid_call_is_valid(self):
        flash_mla_with_kvcache(**VALID)
        flash_mla_with_kvcache(**(VALID | PLAN))
        flash_mla_with_kvcache(**(VALID | dict(q=Q_PAIR)))
        flash_mla_with_kvcache(**GROUPED)
        flash_mla_with_kvcache(**(VALID | UNPAGED))

    @parameterized.parameters(*DECODE_ERRORS)
    def test_decode(self, change, error, message):
        with self.assertRaisesRegex(error, message):
            flash_mla_with_kvcache(**(VALID | change))

    @parameterized.parameters(*PLAN_ERRORS)
    def test_plan(self, args, options, error, message):
        with self.assertRaisesRegex(error, message):
            get_mla_metadata(*args, **options)

    def test_errors_come_while_tracing(self):
        arrays = VALID | dict(q=zeros((2, 1, 3, 576)))
        with self.assertRaisesRegex(ValueError, "multiple of k_cache's h_kv"):
            jax.jit(flash_mla_with_kvcache).lower(**arrays)

    @parameterized.parameters("head_dim_v", "softmax_scale", "causal")
    def test_traced_static_arguments(self, name):
        def decode(value):
            return flash_mla_with_kvcache(**(VALID | {name: value}))

        with self.assertRaisesRegex(TypeError, f"{name}: expected a static .* got a traced value"):
            jax.jit(decode)(1)

    def test_int64_lengths_under_x64(self):
        with jax.enable_x64(True), self.assertRaisesRegex(TypeError, "dtype int32, got int64"):
            flash_mla_with_kvcache(**(VALID | dict(cache_seqlens=np.zeros(2, np.int64))))

    def test_derivatives_are_refused(self):
        def loss(q, k_cache):
            out, _ = flash_mla_with_kvcache(**(VALID | dict(q=q, k_cache=k_cache)))
            return out.astype(jnp.float32).sum()

        q, k_cache = VALID["q"], VALID["k_cache"]
        message = "mla_decode has no derivative: it is an inference operation"
        for argnum in (0, 1):
            with self.assertRaisesRegex(NotImplementedError, message):
                jax.grad(loss, argnum)(q, k_cache)
        with self.assertRaisesRegex(NotImplementedError, message):
            jax.jvp(loss, (q, k_cache), (q, k_cache))
        with self.assertRaisesRegex(NotImplementedError, message):
            jax.jit(jax.vmap(jax.grad(loss), (0, None)))(q[None], k_cache)

    def test_int64_that_fits(self):
        change = dict(cache_seqlens=np.array([5, 6]), block_table=[[0, 1], [2, 0]])
        decoded = flash_mla_with_kvcache(**(VALID | change))
        np.testing.assert_allclose(decoded[1], np.log([[[5]] * 4, [[6]] * 4]), rtol=1e-6)

    def test_derivatives_of_everything_around_it_work(self):
        def loss(x, q):
            out, _ = flash_mla_with_kvcache(**(VALID | dict(q=q)))
            return x * out.astype(jnp.float32).sum()

        self.assertEqual(jax.grad(loss)(2.0, VALID["q"]), 0.0)

    @parameterized.parameters("plan", "decode")
    def test_cuda_where_there_is_none(self, operation):
        reason = native.why_no_kernel(operation)
        if reason is None:
            self.skipTest(f"there is a CUDA kernel for {operation!r} here")
        with self.assertRaises(RuntimeError) as raised:
            if operation == "plan":
                get_mla_metadata(LENGTHS, 16, 1, implementation="cuda")
            else:
                flash_mla_with_kvcache(**VALID, implementation="cuda")
        self.assertEqual(str(raised.exception), f'implementation="cuda" cannot run: {reason}')

    @parameterized.parameters("plan", "decode")
    def test_cuda_in_a_program_for_another_platform(self, operation):
        def run():
            if operation == "plan":
                return get_mla_metadata(LENGTHS, 16, 1, implementation="cuda")
            return flash_mla_with_kvcache(**VALID, implementation="cuda")

        message = 'implementation="cuda" cannot run: the program is compiled for cpu; give it'
        self.enterContext(mock.patch.object(native, "why_no_kernel", return_value=None))
        self.enterContext(jax.default_device(jax.devices("cpu")[0]))
        with self.assertRaisesRegex(RuntimeError, message):
            jax.jit(run).lower()

    def test_show_config(self):
        with self.assertRaisesRegex(ValueError, 'mode: expected "stdout" or "dicts", got \'json\''):
            show_config("json")


if __name__ == "__main__":
    absltest.main()
