"""`benchmarks.compare` tells what moved from what wavers."""

import contextlib
import io
import json
import pathlib
import tempfile

import pytest
from absl.testing import absltest, parameterized

pytest.importorskip("rich", reason="the benchmarks print with rich")
from benchmarks import compare


def summary(median, spread=0.01):
    return {"median": median, "p10": median * (1 - spread), "p90": median * (1 + spread)}


class CompareTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def write(self, name, *rows, **environment):
        path = self.folder / name
        path.write_text(json.dumps({"environment": environment, "rows": rows}))
        return str(path)

    def compare(self, *arguments):
        """What it printed, and the message that it left with."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            try:
                compare.main(arguments)
            except SystemExit as stop:
                return printed.getvalue(), stop.code
        return printed.getvalue(), None

    def runs(self, before, after):
        case = {"batch": 8, "heads": 16}
        return (
            self.write("a", case | {"decode_us": before, "floor_us": summary(5)}),
            self.write("b", case | {"decode_us": after, "floor_us": summary(5)}),
        )

    @parameterized.parameters(
        (summary(10), summary(10), "none of 2 times moved", None),
        (summary(10), summary(10.1), "none of 2 times moved", None),  # spreads overlap
        (summary(10, 0.1), summary(11, 0.1), "none of 2 times moved", None),
        (summary(10, 0.001), summary(10.2, 0.001), "moved: 1 of 2 times", None),  # below 3 %
        (summary(10), summary(9), "moved: 1 of 2 times", None),  # faster
        (summary(10), summary(11), "moved: 1 of 2 times", "slower by more than 3 %: 1 of 2 times"),
    )
    def test_moves(self, before, after, printed, message):
        out, stop = self.compare(*self.runs(before, after))
        self.assertIn(printed, out)
        self.assertEqual(stop, message)

    def test_threshold(self):
        runs = self.runs(summary(10), summary(11))
        self.assertIsNone(self.compare(*runs, "--threshold", "15")[1])

    def test_cases_of_one_run_and_other_machines(self):
        rows = [{"batch": b, "decode_us": summary(10)} for b in (1, 2, 3)]
        before = self.write("a", *rows[:2], device="H100", jax="0.11.2")
        after = self.write("b", *rows[1:], device="H200", jax="0.11.2")
        out, stop = self.compare(before, after)
        self.assertIsNone(stop)
        self.assertIn("not the same device: H100 and H200", out)
        self.assertNotIn("not the same jax", out)
        self.assertIn("1 of the cases are only in the run before", out)
        self.assertIn("1 of the cases are only in the run after", out)

    def test_nothing_in_common(self):
        runs = self.write("a", {"batch": 1}), self.write("b", {"batch": 2})
        self.assertIn("no time of the same case in common", self.compare(*runs)[1])

    @parameterized.parameters("", "[]", "{}", '{"environment": {}, "rows": [1]}')
    def test_other_files(self, text):
        path = self.folder / "c"
        path.write_text(text)
        self.assertIn("expected the JSON of a benchmark", self.compare(str(path), str(path))[1])
        missing = str(self.folder / "none")
        self.assertIn("expected the JSON of a benchmark", self.compare(missing, missing)[1])

    def test_the_project_s_own_results(self):
        results = pathlib.Path(compare.__file__).parent / "results"
        for path in results.glob("*.json"):
            # Made from others; without times.
            if path.name in ("bars.json", "counters.json") or path.name.startswith("fp8_"):
                continue
            self.assertIsNone(self.compare(str(path), str(path))[1])
            rows = json.loads(path.read_text())["rows"]
            timed = [compare.identity(row) for row in rows if compare.times(row)]
            self.assertLen(timed, len(set(timed)), path.name)  # none hides another


if __name__ == "__main__":
    absltest.main()
