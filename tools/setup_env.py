"""Makes the virtual environment that the Makefile's targets use: `setup_env.py <venv> <extras>`.

Runs on whatever `python3` is, so that it can say in one sentence what is missing. With
JAX_RANGE=oldest it installs the oldest jax that pyproject.toml allows, else the newest there is.
"""

from __future__ import print_function

import os
import re
import shutil
import subprocess
import sys

OLDEST_PYTHON = (3, 11)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GIB = 2**30
SPACE = {False: 2 * GIB, True: 12 * GIB}  # without and with CUDA libraries


def fail(sentence):
    sys.exit("jax_flashmla: " + sentence)


def check_python():
    if sys.version_info[:2] >= OLDEST_PYTHON:
        return
    newer = [
        name
        for name in ["python3.%d" % minor for minor in range(20, 10, -1)]
        if any(
            os.access(os.path.join(folder, name), os.X_OK)
            for folder in os.environ.get("PATH", "").split(os.pathsep)
        )
    ]
    fail(
        "Python 3.11 or newer is needed, and this is %d.%d: %s"
        % (
            sys.version_info[0],
            sys.version_info[1],
            "run make with PYTHON=%s." % newer[0]
            if newer
            else "install one and run make with PYTHON=/path/to/it.",
        )
    )


def check_space(folder, with_cuda):
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(folder))).free
    if free < SPACE[with_cuda]:
        fail(
            "{} GiB of free disk space are needed for the virtual environment, and {:.1f} are left "
            "where {} would be: free some, or run make with VENV=/another/disk/venv.".format(
                SPACE[with_cuda] // GIB, float(free) / GIB, folder
            )
        )


def check_native_tools(toolchain, driver):
    """Exits unless the kernels can be built here."""
    without = "; or run make with JAX_FLASHMLA_CUDA=off to do without the kernels."
    if toolchain.find_cxx() is None:
        fail("a C++ compiler is needed to build the CUDA kernels: install g++" + without)
    if toolchain.find_nvcc() is None and not toolchain.nvcc_wheel_runs_on(driver):
        fail(
            "nvcc 12.4 or newer is needed to build the CUDA kernels, and PyPI has one only for "
            "CUDA 13 drivers (this one runs CUDA %d.%d): install the CUDA 12 toolkit and set "
            "CUDA_HOME, or update the driver" % driver + without
        )


def pinned_jax():
    """What to install besides the package."""
    wanted = os.environ.get("JAX_RANGE", "newest")
    if wanted not in ("oldest", "newest"):
        fail("JAX_RANGE must be oldest or newest, and is %r." % wanted)
    if wanted == "newest":
        return []
    with open(os.path.join(ROOT, "pyproject.toml")) as file:
        version = re.search(r'"jax>=([0-9.]+)"', file.read()).group(1)
    return ["jax==" + version, "jaxlib==" + version]


def run(*command, **environment):
    try:
        subprocess.run(command, check=True, env=dict(os.environ, **environment))
    except subprocess.CalledProcessError as error:
        fail("`%s` failed, see above." % " ".join(error.cmd))


def make_venv(folder):
    python = os.path.join(folder, "bin", "python")
    if not os.path.exists(python):
        try:
            import ensurepip  # noqa: F401
            import venv  # noqa: F401
        except ImportError:
            fail(
                "Python's venv module is needed: on Debian or Ubuntu, "
                "`apt install python%d.%d-venv`." % sys.version_info[:2]
            )
        print("Making the virtual environment %s" % folder, flush=True)
        run(sys.executable, "-m", "venv", folder)
        # Old pips do not know the newest wheel tags.
        run(python, "-m", "pip", "install", "--quiet", "--upgrade", "pip>=25")
    return python


def main(folder, extras):
    check_python()
    import toolchain

    driver = toolchain.driver_cuda_version()
    if driver is not None and driver < (12, 0):
        fail("a driver for CUDA 12 or 13 is needed, and this one runs CUDA %d.%d." % driver)
    cuda = os.environ.get("JAX_FLASHMLA_CUDA", "on" if driver else "off")
    check_space(folder, driver is not None)
    if cuda == "on":
        check_native_tools(toolchain, driver)
    python = make_venv(folder)
    extras = extras.split(",")
    if driver is not None:
        extras.append("cuda%d" % min(driver[0], 13))
    print("Installing jax_flashmla[%s], kernels %s" % (",".join(extras), cuda), flush=True)
    run(
        *[python, "-m", "pip", "install", "--quiet", "--editable"],
        *["%s[%s]" % (ROOT, ",".join(extras)), *pinned_jax()],
        JAX_FLASHMLA_CUDA=cuda,
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
