"""Loads published safetensors files onto a mesh, tensor by tensor."""

import contextlib
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors

from examples.deepseek.config import Config
from examples.deepseek.layout import Source, check_divides, sources
from examples.deepseek.model import abstract_model

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = ("BF16", "F16", "F32", "F64")
FP8 = "F8_E4M3"
MOST_PROBLEMS = 10  # that an error lists


class Files:
    """The tensors of a checkpoint, by name, wherever they lie."""

    def __init__(self, directory, stack: contextlib.ExitStack):
        """Opens every file of the checkpoint; `stack` closes them.

        Raises:
          FileNotFoundError: there is no index and no single file, or a file that the index names is
            missing.
          ValueError: the index or a file is malformed.
        """
        directory = pathlib.Path(directory)
        index = directory / INDEX
        names = [SINGLE]
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{index}: expected JSON with a weight_map, got {error}"
                ) from error
        elif not (directory / SINGLE).is_file():
            raise FileNotFoundError(f"{directory}: expected {INDEX} or {SINGLE}, found neither")
        self._where = {}
        for name in names:
            path = directory / name
            if not path.is_file():
                raise FileNotFoundError(f"{path}: {INDEX} names this file, and it is missing")
            try:
                file = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
            except safetensors.SafetensorError as error:
                raise ValueError(f"{path}: expected a safetensors file, got {error}") from error
            self._where |= dict.fromkeys(file.keys(), (path, file))

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._where)

    def __contains__(self, name):
        """Whether there is a tensor of this name."""
        return name in self._where

    def shape(self, name) -> tuple[int, ...]:
        """Of a tensor."""
        return tuple(self._where[name][1].get_slice(name).get_shape())

    def dtype(self, name) -> str:
        """Of a tensor, by safetensors' name for it."""
        return self._where[name][1].get_slice(name).get_dtype()

    def read(self, name, block: tuple[int, int] | None) -> np.ndarray:
        """A tensor; one of FP8 is dequantized to float32, its scales one for each `block`."""
        path, file = self._where[name]
        if self.dtype(name) != FP8:
            return file.get_tensor(name)
        scale = self.read(name + "_scale_inv", None).astype(np.float32)
        return dequantize(_read_fp8(path, name), scale, block)


def _read_fp8(path, name):
    """A tensor of FP8, which the NumPy side of safetensors (0.8) refuses to make."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))[name]
    first, last = entry["data_offsets"]
    raw = np.memmap(path, np.uint8, "r", offset=8 + size + first, shape=last - first)
    return raw.view(ml_dtypes.float8_e4m3fn).reshape(entry["shape"])


def dequantize(tensor: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """FP8 `[rows, columns]` times its blocks' scales `[ceil(rows / 128), ceil(columns / 128)]`.

    Returns float32. The last blocks may be cut off by the edge.
    """
    rows, columns = tensor.shape
    whole = scale.repeat(block[0], axis=0)[:rows].repeat(block[1], axis=1)[:, :columns]
    return tensor.astype(np.float32) * whole


def load(directory, config: Config, mesh: jax.sharding.Mesh, dtype) -> dict[str, jax.Array]:
    """Loads a checkpoint: each parameter goes to its devices before the next is read.

    Every name and shape is checked before any tensor is read. Of the experts' stacks, each device's
    part is read and sent on its own.

    Args:
      directory: has `model.safetensors.index.json` and the files it names, or `model.safetensors`.
      config: from the same directory.
      mesh: has an axis "model".
      dtype: of the parameters; the router's are always float32.

    Returns:
      The parameters of `model.Model`, by name.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: tensors are missing, of another shape or not floating point, or there are tensors
        that this model does not have: one error for all, with what was expected and what came. Or
        the mesh does not divide the model.
    """
    check_divides(config, mesh.shape["model"])
    shapes = abstract_model(config, jnp.dtype(dtype))[2]
    params = {}
    with contextlib.ExitStack() as stack:
        files = Files(directory, stack)
        _check(directory, files, config)
        for name, source in sources(config).items():
            sharding = jax.NamedSharding(mesh, source.spec)
            params[name] = _put(files, source, shapes[name], sharding, config.fp8_block)
            params[name].block_until_ready()  # the host's copy is then free
    return params


def _put(files: Files, source: Source, expected, sharding, block) -> jax.Array:
    """Reads what a parameter is made of, and sends it to the devices."""

    def make(names):
        tensors = [files.read(name, block).astype(expected.dtype, copy=False) for name in names]
        return np.ascontiguousarray(source.assemble(tensors))

    if not source.stacked:
        return jax.device_put(make(source.names), sharding)
    parts = {}
    for device, index in sharding.addressable_devices_indices_map(expected.shape).items():
        parts.setdefault(index[0].indices(len(source.names)), []).append(device)
    arrays = []
    for experts, devices in parts.items():
        part = make([source.names[e] for e in range(*experts)])
        arrays += [jax.device_put(part, device).block_until_ready() for device in devices]
    return jax.make_array_from_single_device_arrays(expected.shape, sharding, arrays)


def _check(directory, files: Files, config: Config):
    """Raises one ValueError for all that is wrong with names, shapes and dtypes."""
    problems, expected = [], {}
    for source in sources(config).values():
        expected |= dict.fromkeys(source.names, source.shape)
    for name, shape in list(expected.items()):
        if name not in files:
            problems.append(f"{name}: expected shape {list(shape)}, and it is missing")
            continue
        if files.shape(name) != shape:
            problems.append(f"{name}: expected shape {list(shape)}, got {list(files.shape(name))}")
        if files.dtype(name) == FP8:
            problems += _check_scale(files, name, shape, config.fp8_block)
            expected[name + "_scale_inv"] = None
        elif files.dtype(name) not in FLOATS:
            kinds = ", ".join((*FLOATS, FP8))
            problems.append(f"{name}: expected one of {kinds}, got {files.dtype(name)}")
    # V3's layer after the last predicts a second token ahead; a decoder of one token has no use
    # for it.
    extra = f"model.layers.{config.num_hidden_layers}."
    for name in files.names():
        if name not in expected and not name.startswith(extra):
            problems.append(f"{name}: expected no such tensor, got shape {list(files.shape(name))}")
    if problems:
        shown = problems[:MOST_PROBLEMS]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        raise ValueError("\n  ".join([f"{directory}: the tensors are not this model's:", *shown]))


def _check_scale(files, name, shape, block):
    """What is wrong with the scales of an FP8 tensor."""
    if block is None:
        return [f"{name}: expected 16 or 32 bits without a quantization_config, got {FP8}"]
    scale = name + "_scale_inv"
    wanted = [-(-size // step) for size, step in zip(shape, block, strict=False)]
    if scale not in files:
        return [f"{scale}: expected shape {wanted}, and it is missing"]
    if list(files.shape(scale)) != wanted:
        return [f"{scale}: expected shape {wanted}, got {list(files.shape(scale))}"]
    return []
