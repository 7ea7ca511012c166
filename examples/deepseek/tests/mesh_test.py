"""The same results on meshes of 8 CPU devices, and what is exchanged there."""

import re

import jax
import numpy as np
from absl.testing import absltest, parameterized

from examples.deepseek.steps import make_mesh
from examples.deepseek.tests import support

LENGTHS = (1, 40, 63, 64, 65, 0, 130, 200)
STEPS = 3
EXCHANGED = re.compile(
    r"= .*? (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


class MeshTest(support.CheckpointTest):
    def setUp(self):
        super().setUp()
        if len(jax.devices()) < 8:
            self.skipTest("needs 8 devices: run it with pytest on a CPU")

    def run_all(self, stepper, sequences):
        tables = support.make_tables(np.random.default_rng(1), stepper)
        rows = [row for row, length in enumerate(LENGTHS) if length]
        first = [
            support.prefill(stepper, sequences[row][: LENGTHS[row]], tables[row], row)
            for row in rows
        ]
        later = support.decode_along(stepper, tables, sequences, LENGTHS, STEPS)
        return np.concatenate([[first], later[:, rows]])

    @parameterized.parameters(
        ("v2_lite", 1, 8, "plain"),
        ("v2_lite", 8, 1, "plain"),
        ("v2", 2, 4, "plain"),
        ("v3", 4, 2, "plain"),
        ("v2_lite", 2, 4, "flash_mla"),
    )
    def test_against_one_device(self, kind, data, model, attention):
        # In 16 bits without experts, between which rounding may choose differently.
        dense = 9 if attention == "flash_mla" else 1
        directory = self.checkpoint(kind, first_k_dense_replace=dense)
        one = support.make_stepper(directory, attention=attention)
        sequences = [
            self.rng.integers(0, one.vocab_size, n + STEPS * bool(n)).tolist() for n in LENGTHS
        ]
        want = self.run_all(one, sequences)
        many = support.make_stepper(directory, attention=attention, mesh=make_mesh(data, model))
        self.assertEqual(many.pools, data)
        limit = 0.02 if attention == "flash_mla" else 1e-5
        support.close(self, self.run_all(many, sequences), want, limit)

    @parameterized.parameters((1, 8), (4, 2))
    def test_only_two_sums_in_a_layer_are_exchanged(self, data, model):
        mesh = make_mesh(data, model)
        stepper = support.make_stepper(self.checkpoint("v3"), attention="flash_mla", mesh=mesh)
        groups = (data, stepper.max_batch // data)
        ids = (
            np.zeros(groups, np.int32),
            np.zeros((*groups, 4), np.int32),
            np.ones(groups, np.int32),
        )
        decode = stepper._decode.lower(stepper.params, stepper.caches, *ids).compile()
        tables = np.zeros((data, 4), np.int32)
        one = np.zeros(16, np.int32), np.int32(0), np.int32(3), tables
        prefill = stepper._prefill.lower(stepper.params, stepper.caches, *one).compile()
        layers = stepper.config.num_hidden_layers
        for compiled in (decode, prefill):
            found = EXCHANGED.findall(compiled.as_text())
            self.assertEqual(found, ["all-reduce"] * 2 * layers)


if __name__ == "__main__":
    absltest.main()
