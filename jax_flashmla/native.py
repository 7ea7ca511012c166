"""Loads the native module and says, in words, why a CUDA kernel can or cannot be used.

The module `jax_flashmla._native` is built only where a CUDA compiler was found (see README.md). It
carries one XLA FFI handler per operation; they are registered here, once, at import.
"""

import importlib
import pathlib
import re
import types

import jax

# Operation name -> XLA FFI target. The module says which of them it carries.
FFI_TARGETS = {"plan": "jax_flashmla_plan", "decode": "jax_flashmla_decode"}

SUPPORTED_COMPUTE_CAPABILITY = "9.0"
BUILD_HINT = "build it on a machine with nvcc 12.4 or newer: `JAX_FLASHMLA_CUDA=on pip install .`"


def running_ffi_version() -> tuple[int, int]:
    """The XLA FFI version of the installed jaxlib, read from the headers that it ships."""
    header = pathlib.Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h"
    text = header.read_text()
    major, minor = (
        int(re.search(rf"#define XLA_FFI_API_{part}\s+(\d+)", text).group(1))
        for part in ("MAJOR", "MINOR")
    )
    return major, minor


def ffi_mismatch(built: tuple[int, int], running: tuple[int, int]) -> str | None:
    """Why handlers built against FFI version `built` cannot run on version `running`, if so.

    XLA takes handlers that are older than itself and refuses newer ones when the backend
    initialises, after which nothing at all runs: so the check has to come before registration.
    """
    if built[0] == running[0] and built[1] <= running[1]:
        return None
    return (
        f"jax_flashmla's native module was built against XLA FFI {built[0]}.{built[1]} and the "
        f"installed jaxlib speaks {running[0]}.{running[1]}: upgrade jaxlib, or rebuild "
        "jax_flashmla against this one"
    )


def _load() -> tuple[types.ModuleType | None, str | None]:
    """Returns (module, None), or (None, why there is none)."""
    try:
        module = importlib.import_module("jax_flashmla._native")
    except ModuleNotFoundError as error:
        if error.name != "jax_flashmla._native":
            raise
        return None, f"the native module is not built; {BUILD_HINT}"
    except ImportError as error:  # built for another interpreter or C library
        return None, f"the native module does not load ({error}); {BUILD_HINT}"
    mismatch = ffi_mismatch(module.ffi_version(), running_ffi_version())
    if mismatch is not None:
        return None, mismatch
    for operation, capsule in module.handlers().items():
        jax.ffi.register_ffi_target(FFI_TARGETS[operation], capsule, platform="CUDA")
    return module, None


module, why_no_module = _load()


def gpus() -> list[jax.Device]:
    """The CUDA devices that JAX sees; empty where there are none."""
    try:
        return jax.devices("cuda")
    except RuntimeError:  # no such backend
        return []


def why_no_kernel(operation: str) -> str | None:
    """Why `operation` ("plan" or "decode") has no CUDA kernel here; `None` if it has one."""
    devices = gpus()
    if not devices:
        return "JAX sees no NVIDIA GPU (is jax[cuda13] or jax[cuda12] installed?)"
    if module is None:
        return why_no_module
    if operation not in module.handlers():
        return f"this version of jax_flashmla has no CUDA kernel for {operation!r}"
    found = sorted({device.compute_capability for device in devices})
    if found != [SUPPORTED_COMPUTE_CAPABILITY]:
        return (
            f"the kernels need compute capability {SUPPORTED_COMPUTE_CAPABILITY} (H100, H200), "
            f"and JAX's devices have {', '.join(found)}"
        )
    return None


def check_implementation(operation: str, implementation: str | None) -> None:
    """Raises if `implementation` is unknown, or `"cuda"` where that cannot run."""
    if implementation not in (None, "cuda", "xla"):
        raise ValueError(f'implementation: expected None, "cuda" or "xla", got {implementation!r}')
    if implementation == "cuda":
        reason = why_no_kernel(operation)
        if reason is not None:
            raise RuntimeError(f'implementation="cuda" cannot run: {reason}')


def check_platforms(implementation: str | None, platforms) -> None:
    """Raises if `implementation` is `"cuda"` in a program for other platforms, as it is lowered."""
    if implementation == "cuda":
        raise RuntimeError(
            'implementation="cuda" cannot run: the program is compiled for '
            f"{', '.join(platforms)}; give it operands on the GPU, or another implementation"
        )


def chosen_implementation(operation: str, implementation: str | None = None) -> str:
    """What `implementation` means on the CUDA platform, or for the default backend."""
    if implementation is not None:
        return implementation
    return "cuda" if why_no_kernel(operation) is None else "xla"
