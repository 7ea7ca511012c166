"""Finds what a build needs on this machine. Standard library only; any Python 3 can import it."""

import ctypes
import glob
import importlib.util
import os
import re
import shutil
import subprocess

OLDEST_NVCC = (12, 4)
DEFAULT_NVCC = "/usr/local/cuda/bin/nvcc"
# nvidia-cuda-nvcc does not pin its own requirements: mixed versions do not compile.
NVCC_WHEELS = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
]


def driver_cuda_version():
    """(major, minor) of the newest CUDA that the NVIDIA driver runs; None without driver or GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, version = ctypes.c_int(0), ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return None
    if driver.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return version.value // 1000, version.value % 1000 // 10


def find_nvcc():
    """(path, (major, minor)) of the first nvcc that is new enough, or None.

    Looks at CUDACXX, CUDA_HOME, PATH, /usr/local/cuda, then NVIDIA's wheel in this Python.
    """
    candidates = [os.environ.get("CUDACXX")]
    if os.environ.get("CUDA_HOME"):
        candidates.append(os.path.join(os.environ["CUDA_HOME"], "bin", "nvcc"))
    candidates += [shutil.which("nvcc"), DEFAULT_NVCC, _nvcc_in_wheel()]
    for path in candidates:
        version = _nvcc_version(path)
        if version is not None and version >= OLDEST_NVCC:
            return path, version
    return None


def _nvcc_in_wheel():
    try:
        spec = importlib.util.find_spec("nvidia")
    except ImportError:
        return None
    for root in (spec.submodule_search_locations or []) if spec else []:
        for path in glob.glob(os.path.join(root, "cu*", "bin", "nvcc")):
            return path
    return None


def _nvcc_version(path):
    if not path:
        return None
    try:
        text = subprocess.run(
            [path, "--version"], stdout=subprocess.PIPE, universal_newlines=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    match = re.search(r"release (\d+)\.(\d+)", text)
    return match and (int(match.group(1)), int(match.group(2)))


def find_cxx():
    """Path of a C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")


def nvcc_wheel_runs_on(driver):
    """Whether code from NVIDIA's nvcc wheel, which exists for CUDA 13 only, runs on `driver`."""
    return driver is None or driver >= (13, 0)
