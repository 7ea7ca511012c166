"""Cases, suites and the command line of `benchmarks.decode`."""

import contextlib
import io
import pathlib
import tempfile
from unittest import mock

import pytest
from absl.testing import absltest, parameterized

pytest.importorskip("rich", reason="the benchmarks print with rich")
from benchmarks import cases, flags, implementations
from benchmarks.cases import make_case


class LengthsTest(parameterized.TestCase):
    def file(self, text):
        folder = self.enterContext(tempfile.TemporaryDirectory())
        path = pathlib.Path(folder, "lengths.txt")
        path.write_text(text)
        return str(path)

    def test_equal(self):
        case = make_case(3, 2, 16, "4096")
        self.assertEqual(case.lengths, (4096,) * 3)
        self.assertTrue(case.equal)
        self.assertEqual(case.pages, 3 * 64)
        self.assertEqual(case.read_bytes, 3 * 4096 * 1152)
        self.assertEqual(case.flops, 3 * 4096 * 2 * 16 * 2 * (576 + 512))
        row = {"batch": 3, "s_q": 2, "heads": 16, "tokens": 4096, "dtype": "bfloat16"}
        self.assertEqual(case.identity(), row)

    @parameterized.parameters((128, 4096, 2048), (64, 8192, 4096), (7, 3, 30), (1, 500, 200))
    def test_normal_has_the_tokens_of_equal_lengths(self, batch, mean, deviation):
        case = make_case(batch, 1, 16, f"normal({mean}, {deviation})")
        self.assertEqual(sum(case.lengths), batch * mean)
        self.assertGreaterEqual(min(case.lengths), 1)
        self.assertEqual(case.identity()["tokens"], mean)
        self.assertEqual(case, make_case(batch, 1, 16, f"normal({mean},{deviation})"))
        if batch == 128:
            self.assertFalse(case.equal)
            mean_square = sum((x - mean) ** 2 for x in case.lengths) / batch
            self.assertBetween(mean_square**0.5, 0.8 * deviation, 1.2 * deviation)

    def test_uniform(self):
        case = make_case(64, 1, 16, "uniform(300,1000)")
        self.assertBetween(min(case.lengths), 300, 400)
        self.assertBetween(max(case.lengths), 900, 1000)
        self.assertEqual(case.identity()["seqlens"], "uniform(300,1000)")
        self.assertEqual(make_case(5, 1, 16, "uniform(7,7)").lengths, (7,) * 5)

    def test_file(self):
        path = self.file("5 70\n900\n")
        case = make_case(None, 1, 16, path)
        self.assertEqual((case.batch, case.lengths), (3, (5, 70, 900)))
        self.assertEqual(case, make_case(3, 1, 16, path))
        self.assertNotEqual(case.seqlens, make_case(None, 1, 16, self.file("5 70 901")).seqlens)
        with self.assertRaisesRegex(ValueError, "expected 4 lengths, .* got 3"):
            make_case(4, 1, 16, path)

    @parameterized.parameters("foo", "0", "-3", "normal(3)", "uniform(9,3)", "uniform(0,0)", "/")
    def test_no_lengths(self, text):
        with self.assertRaisesRegex(ValueError, "^expected .*, got "):
            make_case(2, 1, 16, text)

    @parameterized.parameters("", "a b", "3 0", "4.5")
    def test_no_lengths_in_a_file(self, text):
        with self.assertRaisesRegex(ValueError, "^expected a length .*lengths.txt'"):
            make_case(None, 1, 16, self.file(text))


class SuitesTest(parameterized.TestCase):
    def test_all_holds_every_suite_once(self):
        everything = cases.suite("all")
        for name in cases.SUITES:
            self.assertContainsSubset(cases.suite(name), everything)
        self.assertLen({str(case) for case in everything}, len(everything))

    def test_all_recorded_shapes_are_in(self):
        everything = set(cases.suite("all"))
        for peer in cases.peers()["rows"]:
            shape = peer["b"], peer["s_q"], peer["h_q"], f"{peer['s_k']}"
            self.assertIn(make_case(*shape), everything)

    def test_memory_and_compute(self):
        for case in cases.suite("memory"):
            self.assertFalse(case.bounded_by_products)
        for case in cases.suite("compute"):
            self.assertTrue(case.bounded_by_products)

    def test_unequal_lengths_are_timed_beside_equal_ones(self):
        groups = cases.groups(cases.suite("varlen"))
        self.assertLen(groups, 4)
        for group in groups:
            self.assertEqual([case.equal for case in group], [False, True])

    def test_dtype(self):
        self.assertEqual({case.dtype for case in cases.suite("small", "float16")}, {"float16"})


class FlagsTest(parameterized.TestCase):
    def leaves(self, *arguments):
        """The one line on which the command line leaves."""
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed), self.assertRaises(SystemExit) as stop:
            flags.parse(arguments)
        self.assertEqual(stop.exception.code, 2)
        (line,) = printed.getvalue().splitlines()
        return line.split(": ", 1)[1]

    @parameterized.parameters(
        ("--seqlens", "foo", "--seqlens: expected a length of 1 or more, normal.* got 'foo'"),
        ("--heads", "-1", "--heads: expected a number from 1 to 1,048,576, got '-1'"),
        ("--heads", "0", "--heads: expected a number from 1 to 1,048,576, got '0'"),
        ("--batch", "many", "--batch: expected a number from 1 to 1,048,576, got 'many'"),
        ("--dtype", "float32", "--dtype: expected bfloat16 or float16, got 'float32'"),
        ("--suite", "big", "--suite: expected small, .* or tiny, got 'big'"),
        ("--implementations", "torch", "--implementations: expected cuda, .*, got 'torch'"),
        ("--seqlens", f"{2**31}", "--seqlens: expected cases that fit into .* GiB, got 1 x "),
        ("--sequence", "3", "unrecognized arguments: --sequence 3"),
    )
    def test_bad_flags(self, flag, value, message):
        arguments = (f"{flag}={value}",) if value.startswith("-") else (flag, value)
        self.assertRegex(self.leaves(*arguments), message)

    def test_suite_and_own_cases(self):
        message = self.leaves("--suite", "small", "--heads", "16")
        self.assertEqual(
            message, "--suite: expected a suite or cases of your own, got --heads beside it"
        )

    @parameterized.parameters("cuda", "flash_mla", "flashinfer")
    def test_asked_for_by_name_and_not_there(self, name):
        with mock.patch.object(implementations, "why_not", return_value="there is none"):
            message = self.leaves("--implementations", name)
        self.assertEqual(message, f"--implementations: {name} cannot run: there is none")

    def test_own_cases(self):
        shapes = "--implementations xla --batch 2 3 --heads 16 128 --seqlens 64 uniform(1,9)"
        args = flags.parse(shapes.split())
        self.assertLen(args.cases, 8)
        self.assertEqual({case.s_q for case in args.cases}, {1})
        self.assertEqual(flags.record_name(args), "decode_own_xla")

    @mock.patch.object(implementations, "why_not", lambda name: None)
    @mock.patch.object(flags, "memory_bytes", lambda: 140e9)
    def test_defaults_where_there_is_the_kernel(self):
        args = flags.parse([])
        self.assertEqual(args.cases, cases.suite("all"))
        self.assertEqual(args.names, ["cuda", "plain", "flash_mla", "flashinfer"])
        self.assertEqual(args.required, ["cuda", "plain"])
        self.assertEqual(flags.record_name(args), "decode")
        for arguments, name in (
            ("--suite small", "decode_small"),
            ("--dtype float16", "decode_float16"),
            ("--implementations xla", "decode_xla"),
        ):
            self.assertEqual(flags.record_name(flags.parse(arguments.split())), name)

    def test_peers_that_are_missing_are_one_line(self):
        printed = io.StringIO()
        reasons = {"flash_mla": "no torch", "flashinfer": "no such"}
        with (
            mock.patch.object(implementations, "why_not", reasons.get),
            mock.patch.object(flags, "memory_bytes", lambda: 140e9),
            contextlib.redirect_stdout(printed),
        ):
            self.assertEqual(flags.parse([]).names, ["cuda", "plain"])
        line = "not compared with flash_mla (no torch), flashinfer (no such)\n"
        self.assertEqual(printed.getvalue(), line)


if __name__ == "__main__":
    absltest.main()
