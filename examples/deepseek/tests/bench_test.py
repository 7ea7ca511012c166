"""The benchmark of whole steps runs, tiny, and writes what it measures."""

import json
import os
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
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def run_tiny(self, flags):
        common = "--tiny", "--implementation=xla", "--rounds=2", "--calls=1"
        flags = [*common, f"--out={self.directory}", *flags.split()]
        with mock.patch.object(sys, "argv", ["bench", *flags]):
            bench.main()

    def record(self, name="deepseek_tiny"):
        return json.loads((self.directory / f"{name}.json").read_text())

    @parameterized.parameters((1, 1, "deepseek_tiny"), (2, 2, "deepseek_tiny_2x2"))
    def test_a_tiny_run(self, data, model, name):
        if data * model > len(jax.devices()):
            self.skipTest("needs 4 devices: run it with pytest on a CPU")
        with jax.log_compiles(), self.assertLogs("jax", "WARNING") as logs:
            self.run_tiny(f"--batch 4 --context 64 65 --data {data} --model {model}")
        # With attention and without: contexts and operands from the host have none of their own.
        self.assertLessEqual("".join(logs.output).count("Compiling jit(decode)"), 2)
        record = self.record(name)
        _, row = record["rows"]
        self.assertEqual(record["mesh"], {"data": data, "model": model})
        self.assertEqual((row["batch"], row["context"], row["implementation"]), (4, 65, "xla"))
        for key in ("step_us", "attention_us", "without_attention_us", "with_host_us"):
            self.assertLen(row[key]["samples"], 2)
            self.assertGreater(row[key]["median"], 0)
        self.assertAlmostEqual(row["tokens_per_s"], 4e6 / row["step_us"]["median"], delta=0.1)

    def test_what_does_not_fit_is_said_and_what_fits_is_measured(self):
        fill = bench.fill

        def fill_small_ones(caches):
            if caches[0].shape[1] > 2:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nwhile ...")
            fill(caches)

        with mock.patch.object(bench, "fill", fill_small_ones):
            self.run_tiny("--batch 1 4 --context 300 65")
        fits, *others = self.record()["rows"]
        self.assertEqual((fits["batch"], fits["context"]), (1, 65))
        self.assertGreater(fits["step_us"]["median"], 0)
        common = {"implementation": "xla", "error": "out of memory"}
        want = [{"batch": b, "context": c} | common for b, c in ((1, 300), (4, 65), (4, 300))]
        self.assertEqual(others, want)

    def test_other_errors_are_not_taken_for_it(self):
        error = jax.errors.JaxRuntimeError("INTERNAL: broken")
        with (
            mock.patch.object(bench, "fill", side_effect=error),
            self.assertRaisesRegex(jax.errors.JaxRuntimeError, "broken"),
        ):
            self.run_tiny("--batch 1 --context 64")

    def test_runs_are_added(self):
        def measure(config, params, mesh, batch, contexts, implementation, rounds, calls):
            time = {"median": float(rounds)}
            row = {"batch": batch, "implementation": implementation, "tokens_per_s": 1.0}
            row |= dict.fromkeys(("step_us", "attention_us"), time)
            row |= dict.fromkeys(("without_attention_us", "with_host_us"), time)
            return [row | {"context": n, "attention_share": 0.5} for n in contexts]

        def rows():
            return [(*bench.identity(r), r["step_us"]["median"]) for r in self.record()["rows"]]

        self.enterContext(mock.patch.object(bench, "measure", measure))
        self.run_tiny("--batch 4 1 --context 64 --add")
        self.assertEqual(rows(), [(1, "xla", 64, 2.0), (4, "xla", 64, 2.0)])
        self.run_tiny("--batch 4 --context 256 64 --rounds 3 --add")
        want = [(1, "xla", 64, 2.0), (4, "xla", 64, 3.0), (4, "xla", 256, 3.0)]
        self.assertEqual(rows(), want)
        with (
            mock.patch.dict(os.environ, XLA_FLAGS="--xla_other"),
            self.assertRaisesRegex(SystemExit, "its xla_flags to be --xla_other, got"),
        ):
            self.run_tiny("--batch 8 --context 64 --add")
        self.assertEqual(rows(), want)
        self.run_tiny("--batch 8 --context 64")
        self.assertEqual(rows(), [(8, "xla", 64, 2.0)])

    @parameterized.parameters(
        ("--model 1000", "expected data x model from 1 to .* got 1 x 1000"),
        ("--model 3", "axis model that divides num_attention_heads"),
    )
    def test_meshes_that_there_are_not(self, flags, message):
        if len(jax.devices()) < 3:
            self.skipTest("needs 3 devices: run it with pytest on a CPU")
        with self.assertRaisesRegex(SystemExit, message):
            self.run_tiny(flags)

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
