"""The steps: prefill against decode, 16 bits against float32, garbage in pages, bad arguments."""

from unittest import mock

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from examples.deepseek import attention, steps
from examples.deepseek.config import read_config
from examples.deepseek.model import Model
from examples.deepseek.tests import support
from jax_flashmla import get_mla_metadata

SIZES = {"max_batch": 8, "num_pages": 8, "max_blocks": 4}
LENGTHS = (1, 40, 63, 64, 65, 0, 130, 200)  # a row of padding among them


class StepsTest(support.CheckpointTest):
    def sequences(self, stepper, more=0):
        return [
            self.rng.integers(0, stepper.vocab_size, n + more * bool(n)).tolist() for n in LENGTHS
        ]

    def run_all(self, stepper, tables, sequences, count):
        """Logits of prefill and of `count` steps, `[1 + count, rows, vocabulary]`; no padding."""
        rows = [row for row, length in enumerate(LENGTHS) if length]
        first = np.zeros((len(LENGTHS), stepper.vocab_size), np.float32)
        for row in rows:
            tokens = sequences[row][: LENGTHS[row]]
            first[row] = support.prefill(stepper, tokens, tables[row], row)
        later = support.decode_along(stepper, tables, sequences, LENGTHS, count)
        return np.concatenate([first[None], later])[:, rows]

    def test_prefill_of_any_chunks_is_decode(self):
        stepper = support.make_stepper(self.checkpoint("v3"), prefill_chunk=64)
        tokens = self.rng.integers(0, stepper.vocab_size, 140).tolist()
        table, other = support.make_tables(self.rng, stepper)[:2]
        want = []
        ids, lengths, tables = (np.zeros(x, np.int32) for x in (8, 8, (8, 4)))
        tables[3] = table
        for position, token in enumerate(tokens):
            ids[3], lengths[3] = token, position + 1
            want.append(stepper.decode(ids, tables, lengths)[3])
        start = 0
        for size in (1, 16, 17, 33, 64, 9):
            got = stepper.prefill(tokens[start : start + size], start, other)
            start += size
            support.close(self, got, want[start - 1], 1e-5, f"up to {start}")

    @parameterized.product(kind=("v2", "v3"), dense=(True, False))
    def test_16_bits_against_float32(self, kind, dense):
        directory = self.checkpoint(kind, first_k_dense_replace=9 if dense else 1)
        float32 = support.make_stepper(directory)
        tables = support.make_tables(self.rng, float32)
        sequences = self.sequences(float32, more=3)
        want = self.run_all(float32, tables, sequences, 3)

        def error(dtype, kind):
            stepper = support.make_stepper(directory, dtype=dtype, attention=kind)
            self.assertEqual(stepper.caches[0].dtype, jnp.bfloat16)
            got = self.run_all(stepper, tables, sequences, 3)
            errors = np.abs(got - want).max(-1) / np.abs(want).max(-1)
            # Rounding turns some close choices between experts: then an output is another.
            return errors.max() if dense else np.median(errors)

        # Pools of bfloat16 alone; then the whole model, against the same without the library.
        self.assertLessEqual(error(jnp.float32, "flash_mla"), 0.03)
        plain = error(jnp.bfloat16, "plain")
        self.assertLessEqual(error(jnp.bfloat16, "flash_mla"), 1.5 * plain)
        self.assertLessEqual(plain, 0.2)

    def test_fp8_pools_against_float32(self):
        directory = self.checkpoint("v2", first_k_dense_replace=9)
        float32 = support.make_stepper(directory)
        tables = support.make_tables(self.rng, float32)
        sequences = self.sequences(float32, more=3)
        want = self.run_all(float32, tables, sequences, 3)
        stepper = support.make_stepper(directory, attention="flash_mla", fp8_cache=True)
        self.assertEqual(stepper.caches[0].dtype, jnp.uint8)
        # Garbage in all pages: NaN in values and scales.
        stepper.caches = [jnp.full_like(cache, 0xFF) for cache in stepper.caches]
        got = self.run_all(stepper, tables, sequences, 3)
        errors = np.abs(got - want).max(-1) / np.abs(want).max(-1)
        self.assertLessEqual(errors.max(), 0.15)
        self.assertGreater(errors.max(), 1e-3)
        with self.assertRaisesRegex(ValueError, "fp8_cache: expected False with attention 'plain'"):
            support.make_stepper(directory, fp8_cache=True)

    def test_attention_of_16_bits_against_float32(self):
        # The same keys and queries: only the decode's own rounding is left.
        stepper = support.make_stepper(self.checkpoint("v2_lite"))
        tables = support.make_tables(self.rng, stepper)[None]
        lengths = np.asarray(LENGTHS, np.int32)[None]
        draw = self.rng.standard_normal
        pool = jnp.asarray(draw((1, 40, 64, 1, 576), np.float32), jnp.bfloat16)
        q = [jnp.asarray(draw((8, 8, n), np.float32), jnp.bfloat16) for n in (512, 64)]
        step = attention.Step(tables, lengths, get_mla_metadata(lengths, 8, 1))
        got = attention.attend_with_flash_mla(q, pool, step, 0.05)
        q, pool = [x.astype(jnp.float32) for x in q], pool.astype(jnp.float32)
        want = attention.attend_plainly(q, pool, step, 0.05)
        seen = lengths[0] > 0
        np.testing.assert_array_equal(np.asarray(got, np.float32)[~seen], 0)
        support.close(self, np.asarray(got, np.float32)[seen], np.asarray(want)[seen], 0.01)

    @parameterized.parameters("plain", "flash_mla")
    def test_garbage_in_pages_and_tables_changes_nothing(self, kind):
        directory = self.checkpoint("v2")
        stepper = support.make_stepper(directory, attention=kind)
        tables = support.make_tables(self.rng, stepper)
        sequences = self.sequences(stepper, more=3)
        want = self.run_all(stepper, tables, sequences, 3)
        stepper = support.make_stepper(directory, attention=kind)
        stepper.caches = [jnp.full_like(x, jnp.nan) for x in stepper.caches]
        for row, length in enumerate(LENGTHS):  # entries not in use yet: pages of others
            tables[row, -(-(length + 3 * bool(length)) // 64) :] = self.rng.choice(tables[6:].flat)
        got = self.run_all(stepper, tables, sequences, 3)
        np.testing.assert_array_equal(got, want)

    def test_steps_write_into_the_pools_they_are_given(self):
        stepper = support.make_stepper(self.checkpoint("v2_lite"), attention="flash_mla")
        table = np.zeros((1, 4), np.int32)
        one = np.zeros(16, np.int32), np.int32(0), np.int32(3), table
        rows = np.zeros((1, 8), np.int32), np.zeros((1, 8, 4), np.int32), np.ones((1, 8), np.int32)
        before = stepper.caches
        for step, operands in ((stepper._prefill, one), (stepper._decode, rows)):
            memory = step.lower(stepper.params, before, *operands).compile().memory_analysis()
            self.assertEqual(memory.alias_size_in_bytes, sum(pool.nbytes for pool in before))
        stepper.decode(*(x[0] for x in rows))
        self.assertTrue(all(pool.is_deleted() for pool in before))

    def test_few_prefills_are_compiled(self):
        # No other test has compiled for this vocabulary.
        directory = self.checkpoint("v2_lite", num_hidden_layers=1, vocab_size=520)
        stepper = support.make_stepper(directory, prefill_chunk=64)
        table = support.make_tables(self.rng, stepper)[0]
        with mock.patch.object(
            Model, "prefill", autospec=True, side_effect=Model.prefill
        ) as traced:
            for length in (*range(1, 65, 7), 64):
                stepper.prefill([5] * length, 0, table)
        self.assertEqual(traced.call_count, 3)  # for 16, 32 and 64 tokens


class ArgumentsTest(support.CheckpointTest):
    def setUp(self):
        super().setUp()
        self.directory = self.checkpoint("v2_lite", num_hidden_layers=1)
        self.stepper = support.make_stepper(self.directory, prefill_chunk=64)
        self.table = np.arange(4, dtype=np.int32)

    @parameterized.named_parameters(
        ("none", [], 0, {}, "tokens: expected 1 to 64 of them"),
        ("many", [1] * 65, 0, {}, "tokens: expected 1 to 64 of them, got shape"),
        ("outside", [1, 512], 0, {}, "tokens: expected 0 to 511, got 1 to 512"),
        ("negative", [1], -1, {}, "start: expected positions from 0 to 255, got -1 to -1"),
        ("past", [1] * 64, 200, {}, "start: expected positions from 0 to 255, got 200 to 263"),
        ("pool", [1], 0, {"pool": 1}, "pool: expected 0 to 0, got 1"),
    )
    def test_prefill(self, tokens, start, keywords, message):
        with self.assertRaisesRegex(ValueError, message):
            self.stepper.prefill(tokens, start, self.table, **keywords)

    def test_prefill_table(self):
        for table in (self.table[:3], self.table.astype(np.int64)):
            with self.assertRaisesRegex(ValueError, r"block_table: expected int32 \[4\], got"):
                self.stepper.prefill([1], 0, table)

    @parameterized.named_parameters(
        ("tokens", 0, np.full(8, 512, np.int32), "tokens: expected 0 to 511, got 512 to 512"),
        ("dtype", 0, np.zeros(8), r"tokens: expected int32 \[8\], got float64 \[8\]"),
        ("table", 1, np.zeros((8, 3), np.int32), r"block_table: expected int32 \[8, 4\]"),
        ("lengths", 2, np.full(8, 257, np.int32), "cache_seqlens: expected 0 to 256, got 257"),
    )
    def test_decode(self, index, wrong, message):
        operands = [np.zeros(shape, np.int32) for shape in ((8,), (8, 4), (8,))]
        operands[index] = wrong
        with self.assertRaisesRegex(ValueError, message):
            self.stepper.decode(*operands)

    @parameterized.named_parameters(
        ("attention", {"attention": "none"}, "attention: expected flash_mla or plain, got none"),
        ("batch", {"max_batch": 0}, "max_batch: expected at least 1, got 0"),
        ("pools", {"max_batch": 7, "mesh": (2, 1)}, "max_batch: expected a multiple of 2 pools"),
        ("heads", {"mesh": (1, 3)}, "mesh: expected an axis model that divides num_attention"),
    )
    def test_constructor(self, changes, message):
        if "mesh" in changes:
            changes = changes | {"mesh": steps.make_mesh(*changes["mesh"])}
        with self.assertRaisesRegex(ValueError, message):
            steps.load_stepper(self.directory, **(SIZES | changes))

    def test_mesh(self):
        with self.assertRaisesRegex(ValueError, "mesh: expected data x model from 1 to"):
            steps.make_mesh(1000, 1)

    def test_config(self):
        self.assertEqual(read_config(self.directory), self.stepper.config)


if __name__ == "__main__":
    absltest.main()
