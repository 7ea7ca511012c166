"""Training: the loss falls, and what is saved is what was trained."""

import tempfile

import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest

pytest.importorskip("optax", reason="training needs the extra `example`")
from examples.deepseek import train_tiny
from examples.deepseek.config import read_config
from examples.deepseek.steps import load_stepper
from examples.deepseek.tiny_tokenizer import BOS, EOS, repository_text, train_tokenizer


class TrainTest(absltest.TestCase):
    def test_loss_falls_and_the_checkpoint_is_the_model(self):
        tokenizer, tensors, losses = train_tiny.train(12)
        # From about the uniform distribution's loss on.
        self.assertAlmostEqual(losses[0], np.log(tokenizer.get_vocab_size()), delta=1)
        self.assertLess(np.mean(losses[-3:]), losses[0] - 0.3)

        directory = self.enterContext(tempfile.TemporaryDirectory())
        train_tiny.save(directory, tokenizer, tensors)
        ids = tokenizer.encode(repository_text()[0]).ids[:70]
        want = train_tiny.forward(read_config(directory), tensors, jnp.asarray([ids]))[0, -1]
        stepper = load_stepper(
            directory,
            dtype=jnp.float32,
            attention="plain",
            max_batch=1,
            num_pages=2,
            max_blocks=2,
        )
        got = stepper.prefill(ids, 0, np.arange(2, dtype=np.int32))
        # Saved in bfloat16.
        np.testing.assert_allclose(got, want, atol=0.03 * np.abs(want).max())

    def test_tokenizer(self):
        tokenizer = train_tokenizer(600)
        self.assertEqual(tokenizer.get_vocab_size(), 600)
        for text in (*repository_text(), "never seen: \u00e9\u4e2d\n"):
            ids = tokenizer.encode(text).ids
            self.assertEqual((ids[0], ids.count(0)), (0, 1))
            self.assertEqual(tokenizer.decode(ids), text)
        self.assertEqual(tokenizer.encode(f"{BOS}{EOS}").ids, [0, 0, 1])


if __name__ == "__main__":
    absltest.main()
