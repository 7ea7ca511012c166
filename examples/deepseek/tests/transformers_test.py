"""The model against Hugging Face transformers, in float32 on a CPU."""

import tempfile

import numpy as np
import pytest
from absl.testing import absltest, parameterized

pytest.importorskip("torch", reason="the comparison needs the extra `compare`")
pytest.importorskip("transformers", reason="the comparison needs the extra `compare`")
import torch
import transformers

from examples.deepseek.tests import checkpoints, support
from examples.deepseek.tiny_tokenizer import repository_text

STEPS = 8  # of decode; they cross page boundaries
LENGTHS = (1, 5, 59, 62, 63, 64, 65, 130)  # of the prompts
LIMIT = 1e-3

CASES = {kind: (kind, {}) for kind in checkpoints.FIELDS}
CASES |= {
    "v2_lite_without_yarn": ("v2_lite", {"rope_scaling": None}),
    # Not in any published file: sine and cosine are scaled, too.
    "v3_two_mscales": ("v3", {"rope_scaling": checkpoints.YARN | {"mscale": 1.0}}),
    "v3_dense": ("v3", {"first_k_dense_replace": 9}),
}


class TransformersTest(support.CheckpointTest):
    def both(self, kind, changes):
        directory = self.checkpoint(kind, **changes)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        self.text = tokenizer("\n".join(repository_text())).input_ids
        return theirs.eval(), support.make_stepper(directory)

    def pieces(self, more):
        """Tokens of the repository's text, from anywhere, of all `LENGTHS`."""
        starts = self.rng.integers(0, len(self.text) - 200, len(LENGTHS))
        return [self.text[i : i + n + more] for i, n in zip(starts, LENGTHS, strict=True)]

    @parameterized.named_parameters((name, *case) for name, case in CASES.items())
    def test_logits_of_prefill_and_every_step(self, kind, changes):
        theirs, stepper = self.both(kind, changes)
        tables = support.make_tables(self.rng, stepper)
        sequences = [self.rng.integers(0, stepper.vocab_size, n + STEPS).tolist() for n in LENGTHS]
        with torch.no_grad():
            want = [theirs(torch.tensor([x])).logits[0].numpy() for x in sequences]
        for row, (length, sequence) in enumerate(zip(LENGTHS, sequences, strict=True)):
            got = support.prefill(stepper, sequence[:length], tables[row])
            support.close(self, got, want[row][length - 1], LIMIT, f"prefill of {length}")
        got = support.decode_along(stepper, tables, sequences, LENGTHS, STEPS)
        for row, length in enumerate(LENGTHS):
            support.close(self, got[:, row], want[row][length:], LIMIT, f"decode from {length}")

    @parameterized.parameters(*checkpoints.FIELDS)
    def test_a_checkpoint_that_transformers_saved(self, kind):
        theirs, stepper = self.both(kind, {})
        directory = self.enterContext(tempfile.TemporaryDirectory())
        theirs.save_pretrained(directory)
        tokens = self.rng.integers(0, stepper.vocab_size, 70).tolist()
        table = np.arange(4, dtype=np.int32)
        got = support.prefill(support.make_stepper(directory), tokens, table)
        np.testing.assert_array_equal(got, support.prefill(stepper, tokens, table))

    @parameterized.parameters(*checkpoints.FIELDS)
    def test_greedy_token_by_token(self, kind):
        theirs, stepper = self.both(kind, {})
        tables = support.make_tables(self.rng, stepper)
        prompts = self.pieces(0)
        greedy = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None}
        want = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            made = theirs.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
            want.append(made[0, len(prompt) :].tolist())

        logits = [support.prefill(stepper, x, tables[row]) for row, x in enumerate(prompts)]
        tokens = np.argmax(logits, axis=-1).astype(np.int32)
        got = [tokens]
        for i in range(1, STEPS):
            lengths = np.asarray(LENGTHS, np.int32) + i
            tokens = stepper.decode(tokens, tables, lengths).argmax(-1).astype(np.int32)
            got.append(tokens)
        self.assertEqual(np.stack(got, axis=1).tolist(), want)


if __name__ == "__main__":
    absltest.main()
