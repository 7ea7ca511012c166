"""`benchmarks.decode` from flags to JSON: on a CPU, and with stand-ins for GPU and peers."""

import contextlib
import io
import json
import pathlib
import sys
import tempfile
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

pytest.importorskip("rich", reason="the benchmarks print with rich")
from benchmarks import (
    cases,
    compare,
    decode,
    flags,
    implementations,
    operands,
    peers,
    ratios,
    report,
)
from benchmarks.cases import make_case
from jax_flashmla import flash_mla_with_kvcache, native
from tests.stand_ins import FakeTensor, fake_peers, fake_timer, pretended_gpu

SHAPES = "--batch", "2", "--seqlens", "128", "normal(128,60)"


def run(*arguments):
    """What the program printed, and its record."""
    with tempfile.TemporaryDirectory() as folder:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            decode.main([*arguments, "--out", folder])
        (path,) = pathlib.Path(folder).glob("*.json")
        return printed.getvalue(), json.loads(path.read_text())


def without_ceilings():
    """Spares a GPU the gigabytes and products that its ceilings take."""
    ceilings = {"matmul_tflops": 800.0, "read_gb_per_s": 4000.0}
    return mock.patch.object(decode, "measure_ceilings", lambda: ceilings)


class OnThisMachineTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.enterContext(without_ceilings())

    def test_xla(self):
        printed, record = run(*SHAPES, "--implementations", "xla", "plain", "--dtype", "float16")
        self.assertLen(record["rows"], 2)
        for row in record["rows"]:
            self.assertEqual(row["dtype"], "float16")
            self.assertEqual(row["suite"], "own")
            self.assertEqual(row["tokens"], 128)
            for key in ("xla_us", "plain_xla_us"):
                self.assertGreater(row[key]["median"], 0)
            ratio = row["xla_us"]["median"] / row["plain_xla_us"]["median"]
            self.assertAlmostEqual(row["over_plain"], ratio, delta=0.001)
        unequal = [row for row in record["rows"] if "seqlens" in row]
        self.assertEqual([row["seqlens"] for row in unequal], ["normal(128,60)"])
        self.assertGreater(unequal[0]["over_equal"], 0)
        self.assertIn("wall time", record["timing"]["xla_us"])
        self.assertIn("float16", printed)
        if jax.default_backend() == "cpu":
            self.assertIn("say nothing about the speed of a GPU", printed)
            self.assertIn("say nothing about the speed of a GPU", record["what"])

    def test_pictures(self):
        pytest.importorskip("matplotlib", reason="pictures are drawn with matplotlib")
        folder = self.enterContext(tempfile.TemporaryDirectory())
        run(*SHAPES, "--implementations", "xla", "plain", "--plots", folder)
        names = {path.name for path in pathlib.Path(folder).iterdir()}
        self.assertEqual(names, {"decode_ratios.svg", "decode_roofline.svg"})

    def test_wrong_outputs_are_not_timed(self):
        def wrong(case, operands):
            (out, lse), samplers = implementations.prepare_xla(case, operands)
            return (out.at[-1, 0, 3].add(0.1), lse), samplers

        with (
            mock.patch.object(implementations, "prepare_plain", wrong),
            self.assertRaisesRegex(AssertionError, "sequence 1 has a relative error"),
        ):
            run(*SHAPES, "--implementations", "plain")


class CheckTest(parameterized.TestCase):
    """The check that every benchmark makes first."""

    @parameterized.parameters((1, "uniform(60,200)"), (3, "uniform(60,200)"), (4, "2"))
    def test_right_and_wrong(self, s_q, seqlens):
        case = make_case(3, s_q, 16, seqlens)
        arrays = operands.make_operands(case)
        out, lse = flash_mla_with_kvcache(*arrays, causal=True, implementation="xla")
        operands.check(case, arrays, out, lse)
        with self.assertRaisesRegex(AssertionError, "relative error"):
            operands.check(case, arrays, out.at[0, -1, 2, :60].multiply(1.5), lse)
        with self.assertRaisesRegex(AssertionError, "relative error"):
            operands.check(case, arrays, out.at[2].set(jnp.nan), lse)
        with self.assertRaisesRegex(AssertionError, "lse"):
            operands.check(case, arrays, out, lse + 0.01)

    def test_pages_are_used_once(self):
        case = make_case(5, 1, 16, "uniform(1,400)")
        pool = operands.make_pool(case.pages + 7)
        _, _, table, lengths = operands.make_operands(case, pool, table_tokens=640)
        self.assertEqual(table.shape, (5, 10))
        counts = -(-np.asarray(lengths) // 64)
        used = [row[:count] for row, count in zip(np.asarray(table), counts, strict=True)]
        self.assertEqual(sorted(np.concatenate(used)), list(range(case.pages)))


class WithStandInsTest(parameterized.TestCase):
    """The way that a Hopper GPU takes, with times that are made up."""

    def setUp(self):
        super().setUp()
        bench = types.SimpleNamespace(time_decode=fake_timer)
        module = types.SimpleNamespace(bench=bench, cuda_version=lambda: (13, 0))
        for patch in (
            pretended_gpu(),
            mock.patch.object(native, "module", module),
            mock.patch.object(flags, "memory_bytes", lambda: 8e9),
            mock.patch.object(decode, "measure_matmul", lambda calls: 700.0),
            without_ceilings(),
        ):
            self.enterContext(patch)

    def rows(self, *arguments):
        printed, record = run(*arguments)
        return printed, record, {row.get("seqlens", row["tokens"]): row for row in record["rows"]}

    def test_kernels_beside_peers(self):
        with mock.patch.dict(sys.modules, fake_peers()):
            _, record, rows = self.rows(*SHAPES, "--s_q", "2")
        row = rows[128]
        self.assertEqual(row["floor_us"]["median"], 0.04)
        self.assertEqual(row["decode_us"]["median"], 2.04)
        self.assertLen(row["decode_us"]["samples"], 24)
        self.assertEqual(row["over_floor"], 51)
        self.assertNotIn("plain_xla_us", row)  # which knows no causal mask
        for name in ("flash_mla", "flashinfer"):
            self.assertAlmostEqual(row[f"{name}_here_us"]["median"], 7, delta=0.01)
            self.assertEqual(row[f"over_{name}"], round(2.04 / 7, 3))
            self.assertIn(name, record["peers"])
            self.assertIn("CUDA graph", record["timing"][f"{name}_here_us"])
        for row in rows.values():
            self.assertNotIn("failed", row)
        self.assertEqual(set(record["ceilings"]), {"before", "after"})

    def test_a_peer_that_fails_is_noted(self):
        modules = fake_peers()
        modules["flash_mla"].get_mla_metadata = mock.Mock(side_effect=OSError("no such\nkernel"))
        modules["flashinfer"].mla.BatchMLAPagedAttentionWrapper.run = lambda self, *parts: (
            FakeTensor(jnp.zeros((2, 16, 512)))
        )
        with mock.patch.dict(sys.modules, modules):
            printed, _, rows = self.rows(*SHAPES)
            failed = rows[128]["failed"]
            self.assertEqual(failed["flash_mla"], "OSError: no such")
            self.assertIn("relative error", failed["flashinfer"])
            self.assertIn("flash_mla failed at 2 x 128: OSError: no such", printed)
            self.assertIn("decode_us", rows[128])
            with self.assertRaisesRegex(OSError, "no such"):  # asked for by name
                run(*SHAPES, "--implementations", "flash_mla")

    def test_missing_peers(self):
        with mock.patch.dict(sys.modules, {"torch": None}):
            printed, _, rows = self.rows(*SHAPES)
            self.assertRegex(printed, r"not compared with flash_mla \(\w+Error: .*torch")
            self.assertNotIn("failed", rows[128])
            self.assertIn("torch", peers.why_missing("flashinfer"))

    @parameterized.parameters((16, "floor_us"), (128, None))
    def test_bounds(self, heads, floor):
        _, _, rows = self.rows("--batch", "32", "--heads", str(heads), "--seqlens", "64")
        row, case = rows[64], make_case(32, 1, heads, "64")
        loads = row[floor]["median"] if floor else case.read_bytes / 4e6
        products = case.flops / (700e6 if heads == 128 else 800e6)
        self.assertEqual("hot_matmul_tflops" in row, heads == 128)
        self.assertAlmostEqual(row["bound_us"], max(loads, products), delta=0.01)
        share = row["bound_us"] / row["decode_us"]["median"]
        self.assertAlmostEqual(row["share_of_bound"], share, delta=0.001)

    def test_float16(self):
        _, record, rows = self.rows(*SHAPES, "--dtype", "float16")
        self.assertIn("CUDA graph", record["timing"]["decode_us"])
        self.assertEqual(rows[128]["dtype"], "float16")
        self.assertEqual(rows[128]["floor_us"]["median"], 0.04)

    def test_the_gpu_s_state_at_start_and_end(self):
        lines = iter(["1935 MHz, 2619 MHz, 44, 198.08 W", "1200 MHz, 2619 MHz, 71, 690.00 W"])
        fields = "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw"

        def answer(*command):
            return next(lines) if fields in command else ""

        with mock.patch.object(report, "_first_line", answer):
            _, record, _ = self.rows(*SHAPES)
        states = record["gpu_state"]
        self.assertEqual(states["start"]["temperature.gpu"], "44")
        self.assertEqual(states["end"]["power.draw"], "690.00 W")

    def test_sweeps_time_the_kernels_only(self):
        with mock.patch.object(cases, "SWEEP", ((1, 1, 16, "64"),)):
            _, record, _ = self.rows("--suite", "sweep")
        (row,) = record["rows"]
        self.assertEqual((row["suite"], row["tokens"]), ("sweep", 64))
        for key in ("split_us", "combine_us", "plain_xla_us"):
            self.assertNotIn(key, row)

    def test_recorded_peers_are_of_the_same_chip(self):
        peer = cases.peers()["rows"][0] | {"b": 2, "s_q": 1, "h_q": 16, "s_k": 128}
        peer |= {"decode_us": 4.0, "best_peer_decode_us": 3.0}
        kind = jax.devices()[0].device_kind
        for gpu, there in ((f"{kind}, driver 1", True), ("another", False)):
            recorded = cases.peers() | {"gpu": gpu, "rows": [peer]}
            with mock.patch.object(cases, "peers", lambda recorded=recorded: recorded):
                _, _, rows = self.rows(*SHAPES)
            self.assertEqual("flashmla_us" in rows[128], there)
            self.assertNotIn("flashmla_us", rows["normal(128,60)"])
            if there:
                self.assertEqual(rows[128]["over_flashmla"], round(2.04 / 4, 3))
                self.assertEqual(rows[128]["over_best_peer_normalised"], round(2.04 / 3, 3))

    @parameterized.parameters((32, 16, 1.1), (32, 128, 1.2), (8, 128, 1.0))
    def test_ratios_are_normalised_by_what_bounds_a_case(self, batch, heads, scale):
        # Times on a chip that reads 1.1 times and multiplies 1.2 times as fast would have been
        # so much longer on the peers'.
        recorded = {
            "ceilings_same_run": {
                "hbm_read_gb_per_s": [3900, 4100],
                "matmul_bf16_8192_tflops_before_and_after": [900, 700],
            },
            "rows": [{"b": batch, "s_q": 1, "h_q": heads, "s_k": 64, "best_peer_decode_us": 20}],
        }
        recorded["rows"][0] |= {"decode_us": 25, "fa3_decode_us": 20}
        row = make_case(batch, 1, heads, "64").identity() | {"decode_us": {"median": 10}}
        row |= {"tflops": 1.0, "gb_per_s": 1.0}
        if make_case(batch, 1, heads, "64").bounded_by_products:
            row["hot_matmul_tflops"] = {"median": 840}
        ceilings = {"before": {"read_gb_per_s": 4400, "matmul_tflops": 1}}
        ratios.add_ratios([row], ceilings, recorded)
        self.assertEqual(row["over_best_peer"], 0.5)
        self.assertEqual(row["over_best_peer_normalised"], round(0.5 * scale, 3))
        self.assertEqual(row["over_flashmla_normalised"], round(0.4 * scale, 3))

    def test_compare_tells_lengths_and_dtypes_apart(self):
        _, record, _ = self.rows(*SHAPES)
        keys = {compare.identity(row) for row in record["rows"]}
        self.assertLen(keys, 2)
        other = [row | {"dtype": "float16"} for row in record["rows"]]
        self.assertTrue(keys.isdisjoint(compare.identity(row) for row in other))
        older = [{k: v for k, v in row.items() if k != "dtype"} for row in record["rows"]]
        self.assertEqual(keys, {compare.identity(row) for row in older})


if __name__ == "__main__":
    absltest.main()
