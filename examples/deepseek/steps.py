"""`Stepper`: a model, its page pools, and the two jitted steps that serving calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from examples.deepseek.attention import PAGE, Step, attend_plainly, attend_with_flash_mla
from examples.deepseek.config import Config, read_config
from examples.deepseek.layout import check_divides, sources
from examples.deepseek.model import bind
from jax_flashmla import FP8_BLOCK, get_mla_metadata

ATTENTIONS = {"flash_mla": attend_with_flash_mla, "plain": attend_plainly}
SMALLEST_CHUNK = 16  # tokens; chunks are padded to this times a power of two


def make_mesh(data: int = 1, model: int = 1) -> jax.sharding.Mesh:
    """A mesh of the first `data * model` devices.

    Args:
      data: page pools, each with its part of a decode's sequences.
      model: devices that share a pool's work: its heads, experts and columns.

    Raises:
      ValueError: there are not so many devices.
    """
    devices = jax.devices()
    if data < 1 or model < 1 or data * model > len(devices):
        raise ValueError(
            f"mesh: expected data x model from 1 to {len(devices)} devices, got {data} x {model}"
        )
    return jax.make_mesh(
        (data, model),
        ("data", "model"),
        axis_types=(AxisType.Auto,) * 2,
        devices=devices[: data * model],
    )


class Stepper:
    """A model, its caches and the two jitted steps.

    There is a page pool for each device along the mesh axis "data", usually one. With several,
    row `r` of a decode belongs to pool `r // (max_batch // pools)`, page ids are local to the pool,
    and `num_pages` is that of each.

    Every parameter is an argument of the steps and no state but the pools' contents: a step's
    results depend on tokens, tables and lengths alone.
    """

    page_size = PAGE

    def __init__(
        self,
        config: Config,
        params: dict[str, jax.Array],
        *,
        max_batch: int,
        num_pages: int,
        max_blocks: int,
        prefill_chunk: int = 512,
        mesh: jax.sharding.Mesh | None = None,
        attention: str = "flash_mla",
        implementation: str | None = None,
        fp8_cache: bool = False,
    ):
        """Makes the pools; nothing is compiled before the first step.

        Args:
          config: the model's.
          params: its parameters, by name, on the mesh; see `weights.load`.
          max_batch: rows of a decode.
          num_pages: of each pool.
          max_blocks: columns of a block table: pages of a sequence at most.
          prefill_chunk: tokens of one prefill at most.
          mesh: with axes "data" and "model"; None for one device.
          attention: "flash_mla" decodes through `jax_flashmla`, from pools of bfloat16, or float16
            if the parameters are; "plain" in the parameters' dtype, for tests.
          implementation: of `flash_mla_with_kvcache`.
          fp8_cache: pools in the format `FP8_BLOCK`, for "flash_mla".

        Raises:
          ValueError: a number or name makes no sense, or the mesh does not divide the model.
        """
        mesh = mesh or make_mesh()
        self.config, self.params, self.mesh = config, params, mesh
        self.pools = mesh.shape["data"]
        self.vocab_size, self.max_batch = config.vocab_size, max_batch
        self.num_pages, self.max_blocks = num_pages, max_blocks
        self.prefill_chunk = prefill_chunk
        for name in ("max_batch", "num_pages", "max_blocks", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        check_batch(max_batch, self.pools)
        check_divides(config, mesh.shape["model"])
        dtype = params["embed/embedding"].dtype
        if attention not in ATTENTIONS:
            raise ValueError(f"attention: expected {' or '.join(ATTENTIONS)}, got {attention}")
        if attention == "flash_mla" and dtype.itemsize > 2:
            dtype = jnp.dtype(jnp.bfloat16)
        width = 576
        if fp8_cache:
            if attention != "flash_mla":
                raise ValueError(f"fp8_cache: expected False with attention {attention!r}")
            dtype, width = FP8_BLOCK.dtype, FP8_BLOCK.row_width
        self._decode = make_decode(config, mesh, ATTENTIONS[attention], implementation)
        self._prefill = make_prefill(config, mesh)
        shape = (self.pools, num_pages, PAGE, 1, width)
        make = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=_on(mesh, "data"))
        self.caches = [make(shape, dtype) for _ in range(config.num_hidden_layers)]

    @property
    def max_tokens(self) -> int:
        """Of a sequence: what a block table has room for."""
        return self.max_blocks * PAGE

    def prefill(self, tokens, start: int, block_table, *, pool: int = 0) -> np.ndarray:
        """Writes the latents of one sequence's next tokens into its pages.

        Args:
          tokens: 1 to `prefill_chunk` token ids.
          start: the position of the first; what comes before is read from the pages.
          block_table: int32 `[max_blocks]`, the sequence's pages; entries past the last token's
            page may be anything.
          pool: the sequence's.

        Returns:
          The logits after the last token, float32 `[vocab_size]`.

        Raises:
          ValueError: there are no or too many tokens, for the chunk or for the table; a token
            outside the vocabulary; a table of another shape; no such pool.
        """
        tokens = np.asarray(tokens, np.int32)
        count = tokens.size
        if tokens.ndim != 1 or not 1 <= count <= self.prefill_chunk:
            raise ValueError(
                f"tokens: expected 1 to {self.prefill_chunk} of them, got shape {tokens.shape}"
            )
        if start < 0 or start + count > self.max_tokens:
            raise ValueError(
                f"start: expected positions from 0 to {self.max_tokens - 1}, got {start} to "
                f"{start + count - 1}"
            )
        if not 0 <= pool < self.pools:
            raise ValueError(f"pool: expected 0 to {self.pools - 1}, got {pool}")
        self._check_tokens(tokens)
        padded = np.zeros(self._padded_length(count), np.int32)
        padded[:count] = tokens
        tables = np.full((self.pools, self.max_blocks), -1, np.int32)
        tables[pool] = self._int32("block_table", block_table, (self.max_blocks,))
        logits, self.caches = self._prefill(
            self.params, self.caches, padded, np.int32(start), np.int32(start + count), tables
        )
        return np.asarray(logits)[pool]

    def decode(self, tokens, block_table, cache_seqlens) -> np.ndarray:
        """One new token for each sequence: appends it, attends, and returns what comes next.

        Args:
          tokens: int32 `[max_batch]`.
          block_table: int32 `[max_batch, max_blocks]`; entries past a sequence's last page may be
            anything.
          cache_seqlens: int32 `[max_batch]`, tokens with the new one; 0 for a row of padding.

        Returns:
          Logits, float32 `[max_batch, vocab_size]`; those of padding mean nothing.

        Raises:
          ValueError: another shape, a length past the table, a token outside the vocabulary.
        """
        return np.asarray(self.start_decode(tokens, block_table, cache_seqlens))

    def start_decode(self, tokens, block_table, cache_seqlens) -> jax.Array:
        """`decode` without waiting: the logits stay on the devices."""
        rows, groups = self.max_batch, (self.pools, self.max_batch // self.pools)
        tokens = self._int32("tokens", tokens, (rows,))
        block_table = self._int32("block_table", block_table, (rows, self.max_blocks))
        cache_seqlens = self._int32("cache_seqlens", cache_seqlens, (rows,))
        if cache_seqlens.min() < 0 or cache_seqlens.max() > self.max_tokens:
            raise ValueError(
                f"cache_seqlens: expected 0 to {self.max_tokens}, got {cache_seqlens.min()} to "
                f"{cache_seqlens.max()}"
            )
        self._check_tokens(tokens)
        operands = (
            tokens.reshape(groups),
            block_table.reshape(*groups, -1),
            cache_seqlens.reshape(groups),
        )
        # NumPy's would be of another type to jit, without a mesh: a second program for callers who
        # have theirs on the devices.
        operands = jax.device_put(operands, _on(self.mesh, "data"))
        logits, self.caches = self._decode(self.params, self.caches, *operands)
        return logits

    def _padded_length(self, count):
        """One of few lengths, each of which is compiled once."""
        length = SMALLEST_CHUNK
        while length < count:
            length *= 2
        return min(length, self.prefill_chunk)

    def _check_tokens(self, tokens):
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise ValueError(
                f"tokens: expected 0 to {self.vocab_size - 1}, got {tokens.min()} to {tokens.max()}"
            )

    @staticmethod
    def _int32(name, array, shape):
        array = np.asarray(array)
        if array.shape != shape or array.dtype != np.int32:
            raise ValueError(
                f"{name}: expected int32 {list(shape)}, got {array.dtype} {list(array.shape)}"
            )
        return array


def check_batch(max_batch: int, pools: int) -> None:
    """Raises unless every pool has as many rows of a decode."""
    if max_batch % pools:
        raise ValueError(f"max_batch: expected a multiple of {pools} pools, got {max_batch}")


def load_stepper(directory, *, dtype=jnp.bfloat16, mesh=None, **options) -> Stepper:
    """A `Stepper` with the checkpoint in `directory`; `options` are the class's.

    Raises:
      FileNotFoundError, ValueError: see `read_config` and `weights.load`.
    """
    from examples.deepseek import weights  # random ones, as a benchmark's, need no safetensors

    mesh = mesh or make_mesh()
    config = read_config(directory)
    return Stepper(config, weights.load(directory, config, mesh, dtype), mesh=mesh, **options)


@functools.cache
def make_decode(config: Config, mesh, attend, implementation=None):
    """The jitted decode; steppers of the same model share it.

    `(params, caches, tokens [g, b], block_table [g, b, max_blocks], cache_seqlens [g, b])` to
    logits `[g * b, vocab_size]` and the caches, which are donated.
    """

    def decode(params, caches, tokens, block_table, cache_seqlens):
        heads = config.num_attention_heads // mesh.shape["model"]
        # Once for all layers; for this device's heads, since it runs inside the shard_map.
        fp8 = jax.tree.leaves(caches)[0].dtype == FP8_BLOCK.dtype
        metadata = get_mla_metadata(
            cache_seqlens, heads, 1, is_fp8_kvcache=fp8, implementation=implementation
        )
        model = bind(config, params, "model")
        step = Step(block_table, cache_seqlens, metadata)
        attention = functools.partial(attend, implementation=implementation)
        logits, caches = model.decode(tokens, caches, step, attention)
        return logits.reshape(-1, logits.shape[-1]), caches

    return _on_mesh(decode, config, mesh, (P("data"), P("data"), P("data")))


@functools.cache
def make_prefill(config: Config, mesh):
    """The jitted prefill of one sequence; steppers of the same model share it.

    `(params, caches, tokens [t], start, length, block_table [g, max_blocks])` to logits
    `[g, vocab_size]` and the caches, which are donated; see `Model.prefill`.
    """

    def prefill(params, caches, tokens, start, length, block_table):
        model = bind(config, params, "model")
        return model.prefill(tokens, start, length, caches, block_table)

    return _on_mesh(prefill, config, mesh, (P(), P(), P(), P("data")))


def _on_mesh(step, config, mesh, specs):
    """Jits `(params, caches, *operands) -> (logits, caches)`, a device's part on each device."""
    params = {name: source.spec for name, source in sources(config).items()}
    run = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(params, P("data"), *specs),
        out_specs=(P("data", "model"), P("data")),
    )
    return jax.jit(run, donate_argnums=1)


def _on(mesh, *spec):
    return jax.NamedSharding(mesh, P(*spec))
