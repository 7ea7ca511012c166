"""The benchmark of whole steps runs, tiny, and writes what it measures."""

import json
import pathlib
import sys
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

pytest.importorskip("rich", reason="the benchmarks print with rich")
from examples.deepseek import bench, steps
from examples.deepseek.attention import Step, attend_with_flash_mla
from examples.deepseek.config import parse_config
from examples.deepseek.presets import TINY
from examples.deepseek.rope import softmax_scale
from examples.deepseek.tests.support import close
from jax_flashmla import get_mla_metadata


class BenchTest(parameterized.TestCase):
    @parameterized.parameters((1, 1, "deepseek_tiny"), (2, 2, "deepseek_tiny_2x2"))
    def test_a_tiny_run(self, data, model, name):
        directory = self.enterContext(tempfile.TemporaryDirectory())
        flags = ["--tiny", "--batch", "4", "--context", "65", "--rounds", "2", "--calls", "1"]
        flags += ["--data", str(data), "--model", str(model), "--out", directory]
        with mock.patch.object(sys, "argv", ["bench", *flags]):
            bench.main()
        record = json.loads((pathlib.Path(directory) / f"{name}.json").read_text())
        (row,) = record["rows"]
        self.assertEqual(record["mesh"], {"data": data, "model": model})
        self.assertEqual((row["batch"], row["context"], row["implementation"]), (4, 65, "xla"))
        for key in ("step_us", "attention_us", "without_attention_us", "with_host_us"):
            self.assertLen(row[key]["samples"], 2)
            self.assertGreater(row[key]["median"], 0)
        self.assertAlmostEqual(row["tokens_per_s"], 4e6 / row["step_us"]["median"], delta=0.1)

    def test_the_attention_that_is_timed_is_every_layers(self):
        config, mesh = parse_config(TINY), steps.make_mesh()
        rng = np.random.default_rng()

        def draw(*shape):
            return jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)

        pools = [draw(1, 4, 64, 1, 576) for _ in range(3)]
        q_nope, q_rope, rows = draw(2, 4, 512), draw(2, 4, 64), draw(1, 2, 1, 576)
        table, lengths = (
            np.arange(4, dtype=np.int32).reshape(1, 2, 2),
            np.full((1, 2), 65, np.int32),
        )
        step = Step(table, lengths, get_mla_metadata(lengths, 4, 1))
        want = q_nope
        for pool in pools:
            for sequence, page in enumerate((1, 3)):
                pool = pool.at[0, page, 0, 0].set(rows[0, sequence, 0])
            want = attend_with_flash_mla((want, q_rope), pool, step, softmax_scale(config))
        attention = bench.make_attention(config, mesh, None)
        caches = [jax.device_put(pool) for pool in pools]
        got, _ = attention(q_nope, q_rope, rows, caches, table, lengths)
        close(self, *(np.asarray(x, np.float32) for x in (got, want)), 0.02)

    @parameterized.parameters(
        ("--batch 0", "batch: expected at least 1, got 0"),
        ("--batch 3 --data 2", "batch: expected multiples of 2 pools, got 3"),
        ("--implementation cuda", "cuda cannot run"),
    )
    def test_refused(self, flags, message):
        if "cuda" in flags and jax.default_backend() == "gpu":
            self.skipTest("it can, here")
        with (
            mock.patch.object(sys, "stderr") as stderr,
            self.assertRaises(SystemExit),
        ):
            bench.parse(flags.split())
        said = "".join(str(call.args[0]) for call in stderr.write.call_args_list)
        self.assertRegex(said, message)


if __name__ == "__main__":
    absltest.main()
