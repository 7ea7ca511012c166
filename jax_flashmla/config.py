"""`show_config`: what is installed, what was built, what will run."""

import jax
import jaxlib

from jax_flashmla import native
from jax_flashmla.version import __version__


def _version(pair: tuple[int, int]) -> str:
    return f"{pair[0]}.{pair[1]}"


def show_config(mode: str = "stdout") -> dict | None:
    """Prints which versions, devices and implementations this installation uses.

    Initialises JAX's backends, since it lists the devices.

    Args:
      mode: `"stdout"` prints; `"dicts"` returns the same as a dictionary (as `numpy.show_config`).

    Raises:
      ValueError: `mode` is neither.
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f'mode: expected "stdout" or "dicts", got {mode!r}')
    module = native.module
    config = {
        "jax_flashmla": __version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "XLA FFI of this jaxlib": _version(native.running_ffi_version()),
        "XLA FFI built against": _version(module.ffi_version()) if module else None,
        "CUDA built with": _version(module.cuda_version()) if module else None,
        "native module": module.__file__ if module else f"none: {native.why_no_module}",
        "devices": [
            f"{device}: {device.device_kind}"
            + (f", compute capability {cc}" if (cc := _compute_capability(device)) else "")
            for device in jax.devices()
        ],
        "default implementation": {
            operation: native.chosen_implementation(operation)
            + (f" ({reason})" if (reason := native.why_no_kernel(operation)) else "")
            for operation in native.FFI_TARGETS
        },
    }
    if mode == "dicts":
        return config
    for key, value in config.items():
        if isinstance(value, dict):
            value = [f"{name}: {text}" for name, text in value.items()]
        lines = value if isinstance(value, list) else [value]
        print(f"{key:24}{lines[0]}")
        for line in lines[1:]:
            print(f"{'':24}{line}")
    return None


def _compute_capability(device: jax.Device) -> str | None:
    return getattr(device, "compute_capability", None)
