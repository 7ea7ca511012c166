"""What the tests share: sequences in pools' pages, fed step by step."""

import tempfile

import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from examples.deepseek import steps
from examples.deepseek.tests import checkpoints

MAX_BLOCKS = 4
CHUNK = 16  # one length to compile


def close(test_case, got, want, limit, what=""):
    """Largest difference, as a share of the largest expected value."""
    test_case.assertEqual(got.shape, want.shape)
    error = np.abs(got - want).max() / np.abs(want).max()
    test_case.assertLessEqual(error, limit, what)  # NaN fails, too


def make_stepper(directory, **options):
    """Room for 8 sequences of 256 tokens, in float32 throughout unless told otherwise."""
    options = {"dtype": jnp.float32, "attention": "plain", "prefill_chunk": CHUNK} | options
    return steps.load_stepper(
        directory, max_batch=8, num_pages=40, max_blocks=MAX_BLOCKS, **options
    )


def make_tables(rng, stepper):
    """Pages for every row of a decode, in no order; local to each row's pool."""
    rows = stepper.max_batch // stepper.pools
    pages = [rng.permutation(stepper.num_pages)[: rows * MAX_BLOCKS] for _ in range(stepper.pools)]
    return np.concatenate(pages).reshape(stepper.max_batch, MAX_BLOCKS).astype(np.int32)


def prefill(stepper, tokens, table, row=0):
    """The logits after a sequence of any length."""
    pool = row // (stepper.max_batch // stepper.pools)
    for start in range(0, len(tokens), CHUNK):
        logits = stepper.prefill(tokens[start : start + CHUNK], start, table, pool=pool)
    return logits


def decode_along(stepper, tables, sequences, first, count):
    """Feeds every row `r` its tokens from `first[r]` on; an empty sequence is a row of padding.

    Returns the logits of each step, `[count, max_batch, vocabulary]`.
    """
    found = []
    for i in range(count):
        tokens = np.zeros(stepper.max_batch, np.int32)
        lengths = np.zeros(stepper.max_batch, np.int32)
        for row, sequence in enumerate(sequences):
            if len(sequence):
                tokens[row], lengths[row] = sequence[first[row] + i], first[row] + i + 1
        found.append(stepper.decode(tokens, tables, lengths))
    return np.stack(found)


class CheckpointTest(parameterized.TestCase):
    """Tests with random checkpoints."""

    def setUp(self):
        super().setUp()
        self.rng = np.random.default_rng(0)

    def checkpoint(self, kind, **changes):
        """A directory with a random checkpoint in it, until the test ends."""
        directory = self.enterContext(tempfile.TemporaryDirectory())
        return checkpoints.write_random(directory, kind, self.rng, **changes)
