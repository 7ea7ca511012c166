"""Tables and pictures from records of `benchmarks.decode` and `benchmarks.step`."""

import json
import pathlib
import tempfile
from unittest import mock

import pytest
from absl.testing import absltest, parameterized

pytest.importorskip("rich", reason="the benchmarks print with rich")
from benchmarks import cases, report, tables
from tests import decode_records


def loading(**records):
    return mock.patch.object(tables, "load", lambda name: records[name])


class TablesTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.record = decode_records.make_record()

    def test_decode(self):
        with loading(decode=self.record):
            text = tables.decode()
        equal, _, unequal, *_ = text.split("\n\n")
        self.assertLen(equal.splitlines(), 2 + len(cases.peers()["rows"]))
        self.assertIn("FlashMLA", equal)
        self.assertIn("| 128 | 1 | 16 | N(4096,2048) |", unequal)
        widths = {line.count("|") for line in unequal.splitlines()}
        self.assertLen(widths, 1)
        self.assertIn("4,500 GB/s read, 810 TFLOP/s", text)

    def test_a_row_says_what_the_record_says(self):
        row = next(row for row in self.record["rows"] if row["batch"] == 8)
        with loading(decode=self.record):
            (line,) = (x for x in tables.decode().splitlines() if x.startswith("| 8 |"))
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        self.assertEqual(cells[4], f"{row['decode_us']['median']:.1f}")
        self.assertEqual(cells[7], f"{row['floor_us']['median']:.1f}")
        self.assertEqual(cells[9:], [f"{row['flashmla_us']:.1f}", f"{row['fa3_us']:.1f}"])

    def test_plain_times_without_a_spread(self):
        for row in self.record["rows"]:
            if "plain_xla_us" in row:
                row["plain_xla_us"] = 1234.5
        with loading(decode=self.record):
            self.assertIn("| 1,234 |", tables.decode())

    def test_step(self):
        row = {"batch": 1, "heads": 16, "tokens": 4096, "launches": {"cuGraphLaunch (x)": 1}}
        row |= {"layer_us": {"median": 13.0}, "kernel_us": {"median": 12.0}}
        record = {"environment": decode_records.ENVIRONMENT, "rows": [row]}
        with loading(step=record):
            self.assertIn("| 13.0 | 12.0 | 1 x cuGraphLaunch |", tables.step())
        row |= {"slope_us": 12.34, "replanned_us": {"median": 15.0}, "gaps_us": 0.5}
        with loading(step=record):
            text = tables.step()
        self.assertIn("| 13.0 | 12.0 | 12.3 | 15.0 | 0.5 | 1 x cuGraphLaunch |", text)
        self.assertLen({line.count("|") for line in text.splitlines()[:3]}, 1)


class FiguresTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        pytest.importorskip("matplotlib", reason="pictures are drawn with matplotlib")
        from benchmarks import figures

        self.figures = figures
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def draw(self, record):
        """The names of the pictures that were drawn, all of which are there."""
        drawn = {
            name
            for name in self.figures.FIGURES
            if self.figures.save(name, record, self.folder, "of a test")
        }
        for name in drawn:
            self.assertIn("of a test", (self.folder / f"{name}.svg").read_text())
        return drawn

    def test_everything(self):
        self.assertEqual(self.draw(decode_records.make_record()), set(self.figures.FIGURES))

    def test_bars_are_as_long_as_the_ratios(self):
        from matplotlib.figure import Figure

        record, figure = decode_records.make_record("compute"), Figure()
        self.figures.draw_ratios(record, figure)
        (axes,) = figure.axes
        widths = [[bar.get_width() for bar in bars] for bars in axes.containers]
        times = [(row["decode_us"]["median"], row) for row in record["rows"]]
        for key, found in zip(("flashmla_us", "fa3_us"), widths, strict=True):
            self.assertEqual(found, [row[key] / ours for ours, row in times])

    def test_lines_go_through_the_times(self):
        from matplotlib.figure import Figure

        record, figure = decode_records.make_record("sweep"), Figure()
        self.figures.draw_sweep(record, figure)
        lines = figure.axes[0].lines
        rows = [row for row in record["rows"] if row["batch"] == 1 and row["heads"] == 16]
        for line, key in zip(lines, ("decode_us", "floor_us"), strict=False):
            self.assertEqual(list(line.get_xdata()), [row["tokens"] for row in rows])
            self.assertEqual(list(line.get_ydata()), [row[key]["median"] for row in rows])

    def test_the_project_s_own_results(self):
        record = json.loads((report.RESULTS / "decode.json").read_text())
        self.assertEqual(self.draw(record), set(self.figures.FIGURES))

    @parameterized.parameters("small", "varlen", "compute")
    def test_a_suite(self, suite):
        drawn = self.draw(decode_records.make_record(suite))
        self.assertContainsSubset({"decode_ratios", "decode_roofline"}, drawn)
        self.assertEqual("decode_sweep" in drawn, suite == "small")

    def test_same_record_same_picture(self):
        record = decode_records.make_record()
        self.draw(record)
        first = {path.name: path.read_text() for path in self.folder.iterdir()}
        self.draw(record)
        for name, text in first.items():
            self.assertEqual((self.folder / name).read_text(), text)

    def test_nothing_ran(self):
        row = {"batch": 1, "s_q": 1, "heads": 16, "tokens": 5, "failed": {"flash_mla": "x"}}
        self.assertEqual(self.draw({"ceilings": {}, "rows": [row]}), set())


if __name__ == "__main__":
    absltest.main()
