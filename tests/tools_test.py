"""What the two commands say where something is missing."""

import os
import pathlib
import subprocess
import sys
import tempfile
import types
import unittest
from unittest import mock

from absl.testing import absltest, parameterized

TOOLS = pathlib.Path(__file__).parent.parent / "tools"
GIB = 2**30

if not TOOLS.is_dir():
    raise unittest.SkipTest("tests run without the repository's tools")
sys.path.insert(0, str(TOOLS))
import setup_env  # noqa: E402
import toolchain  # noqa: E402


class SetupEnvTest(parameterized.TestCase):
    def fails_with(self, message):
        return self.assertRaisesRegex(SystemExit, f"^jax_flashmla: {message}")

    def test_old_python_with_a_newer_one_at_hand(self):
        folder = self.enterContext(tempfile.TemporaryDirectory())
        pathlib.Path(folder, "python3.13").touch(mode=0o755)
        with (
            mock.patch.object(sys, "version_info", (3, 9, 2)),
            mock.patch.dict(os.environ, PATH=folder),
            self.fails_with(r"Python 3.11 .* is 3.9: run make with PYTHON=python3.13\.$"),
        ):
            setup_env.check_python()

    def test_old_python_alone(self):
        with (
            mock.patch.object(sys, "version_info", (3, 9, 2)),
            mock.patch.dict(os.environ, PATH=""),
            self.fails_with(r"Python 3.11 .* is 3.9: install one and run make with PYTHON="),
        ):
            setup_env.check_python()

    def test_this_python_is_new_enough(self):
        setup_env.check_python()

    @parameterized.parameters((False, "2 GiB"), (True, "12 GiB"))
    def test_full_disk(self, with_cuda, needed):
        usage = types.SimpleNamespace(free=GIB // 2)
        with (
            mock.patch.object(setup_env.shutil, "disk_usage", return_value=usage),
            self.fails_with(f"{needed} of free disk space are needed .* 0.5 are left where .venv"),
        ):
            setup_env.check_space(".venv", with_cuda)

    def check_tools(self, cxx, nvcc, driver):
        tools = types.SimpleNamespace(
            find_cxx=lambda: cxx,
            find_nvcc=lambda: nvcc,
            nvcc_wheel_runs_on=toolchain.nvcc_wheel_runs_on,
        )
        setup_env.check_native_tools(tools, driver)

    def test_native_tools(self):
        nvcc = ("/usr/bin/nvcc", (12, 4))
        self.check_tools("/usr/bin/g++", nvcc, (12, 4))
        self.check_tools("/usr/bin/g++", None, (13, 0))  # the wheel serves
        with self.fails_with("a C.. compiler is needed .* install g..; or run make with .*=off"):
            self.check_tools(None, nvcc, (12, 4))
        with self.fails_with(r"nvcc 12.4 .* \(this one runs CUDA 12.6\): install the CUDA 12"):
            self.check_tools("/usr/bin/g++", None, (12, 6))

    def test_a_failing_command_is_named(self):
        with self.fails_with("`false` failed"):
            setup_env.run("false")

    def test_make_without_python(self):
        root = TOOLS.parent
        command = [
            "make",
            "-C",
            str(root),
            "demo",
            "PYTHON=python3-that-is-not-there",
            "VENV=/nope",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn(
            "there is no 'python3-that-is-not-there': install it, or run make", done.stderr
        )


class ToolchainTest(absltest.TestCase):
    def folder(self):
        return pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def fake_nvcc(self, release):
        path = self.folder() / "nvcc"
        path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V1'\n")
        path.chmod(0o755)
        return str(path)

    def find(self, **environment):
        with (
            mock.patch.dict(os.environ, {"PATH": "", **environment}, clear=True),
            mock.patch.object(toolchain, "_nvcc_in_wheel", return_value=None),
            mock.patch.object(toolchain, "DEFAULT_NVCC", "/nope"),
        ):
            return toolchain.find_nvcc()

    def test_nvcc_by_variable(self):
        new, old = self.fake_nvcc("13.0"), self.fake_nvcc("12.3")
        self.assertEqual(self.find(CUDACXX=new), (new, (13, 0)))
        self.assertIsNone(self.find(CUDACXX=old))
        self.assertIsNone(self.find(CUDACXX="/no/nvcc"))

    def test_nvcc_by_home(self):
        home = self.folder()
        (home / "bin").mkdir()
        (home / "bin" / "nvcc").symlink_to(self.fake_nvcc("12.4"))
        self.assertEqual(self.find(CUDA_HOME=str(home)), (str(home / "bin" / "nvcc"), (12, 4)))

    def test_no_driver(self):
        with mock.patch.object(toolchain.ctypes, "CDLL", side_effect=OSError):
            self.assertIsNone(toolchain.driver_cuda_version())

    def test_wheels_of_nvcc(self):
        self.assertTrue(toolchain.nvcc_wheel_runs_on(None))
        self.assertTrue(toolchain.nvcc_wheel_runs_on((13, 0)))
        self.assertFalse(toolchain.nvcc_wheel_runs_on((12, 9)))


if __name__ == "__main__":
    absltest.main()
