"""The `--require-gpu` flag."""

from tests import support


def pytest_addoption(parser):
    parser.addoption(
        "--require-gpu",
        action="store_true",
        help="fail, instead of skipping, the tests that need a Hopper GPU and the kernels",
    )


def pytest_configure(config):
    support.gpu_required = config.getoption("--require-gpu")
