"""Build backend: scikit-build-core, with or without the CUDA kernels.

The environment variable JAX_FLASHMLA_CUDA decides: `on`, `off`, or `auto` (the default: on where
there is nvcc, or an NVIDIA driver for which nvcc can be installed as a wheel). Only a build with
kernels needs CMake, nanobind and jaxlib's headers, so only then are they asked for.
"""

import os
import sys

import toolchain
from scikit_build_core import build as skbuild
from scikit_build_core.build import build_sdist, get_requires_for_build_sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

# jaxlib: the oldest supported one, exactly. Handlers built against older FFI headers run on newer
# jaxlibs; the reverse is refused when the backend initialises.
NATIVE_REQUIREMENTS = ["jaxlib==0.10.0", "nanobind==2.15.0", "nvidia-cutlass==4.2.0.0"]


def wants_cuda():
    choice = os.environ.get("JAX_FLASHMLA_CUDA", "auto").lower()
    if choice not in ("on", "off", "auto"):
        sys.exit(f"JAX_FLASHMLA_CUDA: expected on, off or auto, got {choice!r}")
    if choice != "auto":
        return choice == "on"
    if toolchain.find_nvcc():
        return True
    driver = toolchain.driver_cuda_version()
    return driver is not None and toolchain.nvcc_wheel_runs_on(driver)


def _requires(base):
    if not wants_cuda():
        return [r for r in base if not r.startswith(("cmake", "ninja"))]
    nvcc_wheels = [] if toolchain.find_nvcc() else toolchain.NVCC_WHEELS
    return [*base, *NATIVE_REQUIREMENTS, *nvcc_wheels]


def get_requires_for_build_wheel(config_settings=None):
    return _requires(skbuild.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _requires(skbuild.get_requires_for_build_editable(config_settings))


def _configure(config_settings):
    """Settings for scikit-build-core; exports CUDACXX for CMake."""
    settings = dict(config_settings or {})
    if not wants_cuda():
        print(
            "jax_flashmla: no nvcc and no NVIDIA driver for CUDA 13 (or JAX_FLASHMLA_CUDA=off): "
            "installing without CUDA kernels; everything runs through XLA.",
            file=sys.stderr,
        )
        return {**settings, "wheel.cmake": "false", "wheel.py-api": "py3"}
    nvcc = toolchain.find_nvcc()
    if nvcc is None:
        sys.exit("jax_flashmla: nvcc 12.4 or newer is needed to build the kernels: set CUDACXX.")
    if toolchain.find_cxx() is None:
        sys.exit("jax_flashmla: a C++ compiler is needed to build the kernels: install g++.")
    os.environ["CUDACXX"] = nvcc[0]
    libraries = os.path.join(os.path.dirname(os.path.dirname(nvcc[0])), "lib")
    if os.path.exists(os.path.join(libraries, "libcudart_static.a")):
        # NVIDIA's wheel: its nvcc looks in lib64, which the wheel does not have.
        inherited = os.environ.get("LIBRARY_PATH", "")
        os.environ["LIBRARY_PATH"] = os.pathsep.join(filter(None, [libraries, inherited]))
    return settings


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    settings = _configure(config_settings)
    return skbuild.prepare_metadata_for_build_wheel(metadata_directory, settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    settings = _configure(config_settings)
    return skbuild.prepare_metadata_for_build_editable(metadata_directory, settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    settings = _configure(config_settings)
    return skbuild.build_wheel(wheel_directory, settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    settings = _configure(config_settings)
    return skbuild.build_editable(wheel_directory, settings, metadata_directory)
