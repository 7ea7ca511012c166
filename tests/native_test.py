"""Loading the native module: versions, reasons, and what show_config says about them."""

import contextlib
import io
import types
from unittest import mock

import jax
import jaxlib
import numpy as np
from absl.testing import absltest, parameterized

import jax_flashmla
from jax_flashmla import native
from tests import support


class FfiVersionTest(parameterized.TestCase):
    @parameterized.parameters(((0, 3), (0, 3)), ((0, 3), (0, 5)))
    def test_older_handlers_are_taken(self, built, running):
        self.assertIsNone(native.ffi_mismatch(built, running))

    @parameterized.parameters(((0, 4), (0, 3)), ((1, 0), (0, 9)), ((0, 3), (1, 3)))
    def test_newer_handlers_and_other_majors_are_refused(self, built, running):
        message = native.ffi_mismatch(built, running)
        self.assertIn(f"built against XLA FFI {built[0]}.{built[1]}", message)
        self.assertIn(f"speaks {running[0]}.{running[1]}", message)

    def test_running_version_is_read_from_jaxlib(self):
        major, minor = native.running_ffi_version()
        self.assertEqual(major, 0)
        self.assertGreaterEqual(minor, 3)

    def test_a_newer_module_is_not_registered(self):
        module = types.SimpleNamespace(ffi_version=lambda: (0, 999), handlers=self.fail)
        with mock.patch.object(native.importlib, "import_module", return_value=module):
            loaded, reason = native._load()
        self.assertIsNone(loaded)
        self.assertIn("upgrade jaxlib", reason)

    def test_a_module_that_does_not_load_says_why(self):
        error = ImportError("libfoo.so: undefined symbol")
        with mock.patch.object(native.importlib, "import_module", side_effect=error):
            loaded, reason = native._load()
        self.assertIsNone(loaded)
        self.assertIn("does not load (libfoo.so: undefined symbol)", reason)
        self.assertIn("JAX_FLASHMLA_CUDA=on pip install", reason)


class ReasonsTest(absltest.TestCase):
    """why_no_kernel, with modules and devices put in place."""

    def why(self, operation, module, capabilities):
        devices = [types.SimpleNamespace(compute_capability=c) for c in capabilities]
        with (
            mock.patch.object(native, "module", module),
            mock.patch.object(native, "why_no_module", "the native module is not built"),
            mock.patch.object(native, "gpus", return_value=devices),
        ):
            return native.why_no_kernel(operation)

    def test_reasons(self):
        module = types.SimpleNamespace(handlers=lambda: {"plan": None})
        self.assertIn("sees no NVIDIA GPU", self.why("plan", None, []))
        self.assertIn("not built", self.why("plan", None, ["9.0"]))
        self.assertIn("no CUDA kernel for 'decode'", self.why("decode", module, ["9.0"]))
        self.assertIn("sees no NVIDIA GPU", self.why("plan", module, []))
        self.assertIn("devices have 8.0", self.why("plan", module, ["8.0"]))
        self.assertIn("devices have 8.9, 9.0", self.why("plan", module, ["9.0", "8.9"]))
        self.assertIsNone(self.why("plan", module, ["9.0", "9.0"]))

    def test_choice(self):
        with mock.patch.object(native, "why_no_kernel", return_value="there is none"):
            self.assertEqual(native.chosen_implementation("plan"), "xla")
        with mock.patch.object(native, "why_no_kernel", return_value=None):
            self.assertEqual(native.chosen_implementation("plan"), "cuda")
            self.assertEqual(native.chosen_implementation("plan", "xla"), "xla")


class ShowConfigTest(absltest.TestCase):
    def test_prints_versions_devices_and_choices(self):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            self.assertIsNone(jax_flashmla.show_config())
        text = output.getvalue()
        for part in (jax_flashmla.__version__, jax.__version__, jaxlib.__version__, "decode: "):
            self.assertIn(part, text)
        self.assertIn(jax.devices()[0].device_kind, text)

    def test_dicts(self):
        config = jax_flashmla.show_config("dicts")
        self.assertEqual(config["jax"], jax.__version__)
        self.assertLen(config["devices"], jax.device_count())
        if native.module is None:
            self.assertEqual(config["native module"], f"none: {native.why_no_module}")
            self.assertIsNone(config["XLA FFI built against"])


class NativeModuleTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        support.need_kernel(self, "plan")

    def test_is_built_against_the_oldest_ffi(self):
        self.assertEqual(native.module.ffi_version(), (0, 3))
        self.assertGreaterEqual(native.module.cuda_version(), (12, 4))

    def test_config_names_the_module_and_the_gpu(self):
        config = jax_flashmla.show_config("dicts")
        self.assertTrue(config["native module"].endswith(".so"))
        self.assertTrue(all("compute capability 9.0" in d for d in config["devices"]))
        self.assertEqual(config["default implementation"]["plan"], "cuda")

    def test_the_handler_refuses_shapes_that_do_not_fit(self):
        shapes = (
            jax.ShapeDtypeStruct((1, 4, 8), np.int32),
            jax.ShapeDtypeStruct((1, 9), np.int32),  # should be b + 1 = 4
        )
        call = jax.ffi.ffi_call(native.FFI_TARGETS["plan"], shapes)
        attributes = dict(
            overhead_blocks=np.int32(5),
            min_split_blocks=np.int32(4),
            split_cost_blocks=np.int32(16),
        )
        with self.assertRaisesRegex(Exception, "jax_flashmla_plan: shapes do not fit"):
            jax.block_until_ready(call(np.zeros((1, 3), np.int32), **attributes))

    def test_timer(self):
        samples = native.module.bench.time_plan(
            np.full(8, 1000, np.int32),
            num_parts=132,
            overhead_blocks=5,
            min_split_blocks=4,
            split_cost_blocks=16,
            launches=10,
            replays=3,
        )
        self.assertLen(samples, 3)
        self.assertTrue(all(0 < sample < 1000 for sample in samples), samples)


if __name__ == "__main__":
    absltest.main()
