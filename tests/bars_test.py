"""What `benchmarks.bars` makes of a run."""

import json
import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest

from benchmarks import bars, report, tables


def row(suite, batch, heads, tokens=4096, microseconds=10.0, **more):
    summary = {"median": microseconds}
    case = {"suite": suite, "batch": batch, "s_q": 1, "heads": heads, "tokens": tokens}
    return case | {"decode_us": summary, "over_best_peer_normalised": 0.5} | more


ROWS = [
    row("small", 1, 16, microseconds=9.0),
    row("small", 8, 16, microseconds=14.6, over_best_peer_normalised=0.8),
    row("small", 4, 16) | {"over_best_peer_normalised": 0.5},
    row("memory", 32, 16, over_floor=1.2),
    row("memory", 64, 16, over_floor=1.05, over_best_peer_normalised=1.01),
    row("compute", 128, 128),
    row("varlen", 64, 16, over_equal=1.02),
    row("varlen", 128, 16, over_equal=1.05),
    row("varlen", 64, 128, over_equal=1.03),
]
del ROWS[2]["over_best_peer_normalised"]  # lengths that peers were not measured with


class BarsTest(absltest.TestCase):
    def test_figures(self):
        found = {(kind, what): rest for kind, what, *rest in bars.figures(ROWS)}
        expected = {
            ("small", "best peer / ours, mean"): [">= 1.5", 1.581, True],  # of 2 and 1.25
            ("small", "best peer / ours, least"): [">= 1.25", 1.25, True],
            ("small", "1 x 16 heads x 4,096, µs"): ["<= 9", 9.0, True],
            ("small", "8 x 16 heads x 4,096, µs"): ["<= 14.5", 14.6, False],
            ("memory", "best peer / ours, mean"): [">= 1.03", 1.407, True],
            ("memory", "best peer / ours, least"): [">= 1.0", 0.99, False],
            ("memory", "over the loads, batch >= 64, worst"): ["<= 1.07", 1.05, True],
            ("compute", "best peer / ours, mean"): [">= 1.03", 2.0, True],
            ("compute", "best peer / ours, least"): [">= 0.98", 2.0, True],
            ("unequal lengths", "over equal ones, 16 heads, worst"): ["<= 1.03", 1.05, False],
            ("unequal lengths", "over equal ones, 128 heads, worst"): ["<= 1.03", 1.03, True],
        }
        self.assertEqual(found, expected)

    def test_a_bar_is_reached_if_all_runs_reach_it(self):
        slower = [dict(row) for row in ROWS]
        slower[0]["decode_us"] = {"median": 9.1}
        rows = {"decode": ROWS, "repeated_decode": slower}
        rows["planner"] = [
            {"batch": b, "kernel_us": {"median": us}} for b, us in ((1, 1), (8, 2), (512, 4))
        ]

        def load(name):
            return {"environment": {"commit": f"of {name}"}, "rows": rows[name]}

        folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        with mock.patch.object(tables, "load", load), mock.patch.object(report, "RESULTS", folder):
            bars.main([])
            bars.main(["--check"])
            table = json.loads((folder / "bars.json").read_text())
            rows["decode"] = slower
            with self.assertRaisesRegex(SystemExit, "run `make figures`"):
                bars.main(["--check"])
            rows["decode"] = [row("small", 1, 16) | {"suite": "own"}]
            with self.assertRaisesRegex(SystemExit, "no times of peers"):
                bars.main([])
        found = {entry["what"]: entry for entry in table["rows"]}
        self.assertEqual(found["1 x 16 heads x 4,096, µs"]["repeated_decode"], 9.1)
        self.assertFalse(found["1 x 16 heads x 4,096, µs"]["reached"])
        self.assertTrue(found["up to 256 sequences, worst, µs"]["reached"])
        # FlashAttention-3 takes 15.3 + 2.8 and 19.5 + 2.7 µs, FlashMLA more; here 9 + 1, 14.6 + 2.
        together = found["plan + decode of few sequences, better peer / ours, mean"]
        self.assertEqual(together["decode"], 1.556)
        self.assertTrue(together["reached"])
        self.assertEqual(table["commits"]["planner"], "of planner")


if __name__ == "__main__":
    absltest.main()
