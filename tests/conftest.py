"""The `--require-gpu` flag, and 8 CPU devices for the tests of meshes."""

import jax

from tests import support

# Before any test starts a backend; of no effect on GPUs.
jax.config.update("jax_num_cpu_devices", 8)


def pytest_addoption(parser):
    parser.addoption(
        "--require-gpu",
        action="store_true",
        help="fail, instead of skipping, the tests that need a Hopper GPU and the kernels",
    )


def pytest_configure(config):
    support.gpu_required = config.getoption("--require-gpu")
