"""Decode of a whole model with random weights: `python -m examples.deepseek.bench`.

DeepSeek-V2-Lite's true dimensions, weights drawn on the device, caches full of random rows: time of
a decode step against batch and context, for the library's CUDA kernels and for XLA, and the share
of it that attention takes. `--tiny` has small dimensions, for a CPU; `--model 4` divides heads,
experts and columns over 4 devices. On a GPU most of the time goes to XLA's compilation, of three
programs for each batch, and of two more for another implementation.
"""

import functools
import gc
import json
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from benchmarks import report
from benchmarks.timing import time_wall
from examples.deepseek import steps
from examples.deepseek.attention import PAGE, Step, append, attend_with_flash_mla
from examples.deepseek.config import parse_config
from examples.deepseek.errors import is_out_of_memory
from examples.deepseek.layout import check_divides, sources
from examples.deepseek.model import abstract_model
from examples.deepseek.presets import TINY, V2_LITE
from examples.deepseek.rope import softmax_scale
from jax_flashmla import get_mla_metadata, native

BATCHES, CONTEXTS = (1, 8, 32, 128), (1024, 4096, 16384)
TINY_BATCHES, TINY_CONTEXTS = (1, 4), (64, 256)


def draw_params(config, mesh, dtype, key):
    """Random parameters on the mesh, each drawn where it lies."""
    shapes = abstract_model(config, jnp.dtype(dtype))[2]
    params = {}
    for name, source in sources(config).items():
        shape = shapes[name].shape
        fan_in = None if len(shape) == 1 else shape[-2]
        sharding = jax.NamedSharding(mesh, source.spec)
        key, used = jax.random.split(key)
        params[name] = _draw(shape, shapes[name].dtype, fan_in, sharding)(used)
    return params


@functools.cache
def _draw(shape, dtype, fan_in, sharding):
    """A jitted function of a key: normal, with the variance that keeps a product's at 1."""

    def draw(key):
        return jax.random.normal(key, shape, dtype) * ((fan_in or 1) ** -0.5)

    return jax.jit(draw, out_shardings=sharding)


def make_operands(stepper, context):
    """Tokens, tables and lengths of a decode; each sequence has pages of its own."""
    rng = np.random.default_rng(0)
    groups = stepper.pools, stepper.max_batch // stepper.pools
    blocks = -(-context // PAGE)
    tables = [rng.permutation(stepper.num_pages)[: groups[1] * blocks] for _ in range(groups[0])]
    tables = np.stack(tables).reshape(*groups, blocks).astype(np.int32)
    tables = np.pad(tables, ((0, 0), (0, 0), (0, stepper.max_blocks - blocks)))
    tokens = rng.integers(0, stepper.vocab_size, groups).astype(np.int32)
    lengths = np.full(groups, context, np.int32)
    return jax.device_put((tokens, tables, lengths), jax.NamedSharding(stepper.mesh, P("data")))


def fill(caches):
    """Puts pools of random rows of unit variance in place of empty ones, one after the other."""
    for number, pool in enumerate(caches):
        shape, dtype, sharding = pool.shape, pool.dtype, pool.sharding
        caches[number] = pool = None  # there may be no room for two of each
        draw = _draw(shape, dtype, None, sharding)
        # Waits, so that an error for want of memory comes from here.
        caches[number] = draw(jax.random.key(number)).block_until_ready()


def make_attention(config, mesh, implementation):
    """All layers' attention and nothing else: the plan, and each layer's append and decode.

    `(queries, rows, caches, block_table, cache_seqlens)` to the last outputs, and the caches.
    """
    heads = P("data", "model")

    def attend(q_nope, q_rope, rows, caches, block_table, cache_seqlens):
        metadata = get_mla_metadata(
            cache_seqlens, q_nope.shape[1], 1, implementation=implementation
        )
        step = Step(block_table, cache_seqlens, metadata)
        caches = list(caches)
        for number, pool in enumerate(caches):
            pool = append(pool, rows, block_table, cache_seqlens)
            # Each layer's queries are the outputs of the one before: none can be left out.
            q_nope = attend_with_flash_mla(
                (q_nope, q_rope), pool, step, softmax_scale(config), implementation
            )
            caches[number] = pool
        return q_nope, caches

    specs = heads, heads, P("data"), P("data"), P("data"), P("data")
    run = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=(heads, P("data")))
    return jax.jit(run, donate_argnums=3)


def skip_attention(q, pool, step, scale, implementation):
    """In place of attention: the step without it. Its queries are still computed."""
    del pool, step, scale, implementation
    return q[0] + q[1].sum(-1, keepdims=True)


def timed(run, caches, calls, rounds):
    """Microseconds of `run(caches) -> (out, caches)`, a sample for each round; and the caches."""
    box = [caches]

    def call():
        out, box[0] = run(box[0])
        return out

    return [time_wall(call, calls=calls) for _ in range(rounds)], box[0]


def measure(config, params, mesh, batch, contexts, implementation, rounds, calls):
    """Rows of the report, one for each context: the same programs on the same pools.

    Tables are as wide as the longest context needs, and lengths are data: what is not there is not
    read, by the kernels nor by XLA's loop, which ends with the longest sequence.
    """
    blocks = -(-max(contexts) // PAGE)
    pools = mesh.shape["data"]
    stepper = steps.Stepper(
        config,
        params,
        max_batch=batch,
        num_pages=blocks * batch // pools,
        max_blocks=blocks,
        mesh=mesh,
        implementation=implementation,
    )
    fill(stepper.caches)
    caches, stepper.caches = stepper.caches, None
    # Compiled once for all implementations: it has none of any.
    without = steps.make_decode(config, mesh, skip_attention)
    attention = make_attention(config, mesh, implementation)
    keys = jax.random.split(jax.random.key(1), 3)
    shape, dtype = (batch, config.num_attention_heads), caches[0].dtype
    q = [jax.random.normal(keys[i], (*shape, n), dtype) for i, n in enumerate((512, 64))]
    new = jax.random.normal(keys[2], (pools, batch // pools, 1, 576), dtype)

    rows = []
    for context in contexts:
        operands = make_operands(stepper, context)
        runs = {
            "step_us": lambda x, o=operands: stepper._decode(params, x, *o),
            "without_attention_us": lambda x, o=operands: without(params, x, *o),
            "attention_us": lambda x, o=operands: attention(*q, new, x, *o[1:]),
        }
        row = {"batch": batch, "context": context, "implementation": implementation}
        for name, run in runs.items():
            samples, caches = timed(run, caches, calls, rounds)
            row[name] = report.summary(samples)
        host = [np.asarray(x).reshape(batch, *x.shape[2:]) for x in operands]
        stepper.caches = caches
        whole = [time_wall(lambda h=host: stepper.decode(*h), calls=1) for _ in range(rounds)]
        caches, stepper.caches = stepper.caches, None
        row["with_host_us"] = report.summary(whole)
        step, alone = row["step_us"]["median"], row["attention_us"]["median"]
        row["tokens_per_s"] = round(batch / step * 1e6, 1)
        row["attention_share"] = round(alone / step, 3)
        rows.append(row)
        print(f"{implementation}, {batch} x {context:,}: {step:,.0f} µs", flush=True)
    return rows


def measure_what_fits(config, params, mesh, batch, contexts, implementation, rounds, calls):
    """`measure`; contexts for which there is no memory, longest first, get a row that says so."""
    contexts, too_long = sorted(contexts), []
    while contexts:
        case = batch, contexts, implementation, rounds, calls
        try:
            return measure(config, params, mesh, *case) + too_long
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            message = str(error).splitlines()[0]
        # Outside the handler, and with all cycles gone: the error held on to the pools.
        gc.collect()
        row = {"batch": batch, "context": contexts.pop(), "implementation": implementation}
        too_long.insert(0, row | {"error": "out of memory"})
        print(f"{implementation}, {batch} x {row['context']:,}: {message}", flush=True)
    return too_long


def earlier_rows(path, **extra):
    """Rows by their identity, of the JSON that a run before left: none where there is no file.

    Raises:
      ValueError: that run was of other code, elsewhere, or otherwise than `extra` says.
    """
    if not path.is_file():
        return {}
    earlier = json.loads(path.read_text())
    found = earlier | earlier["environment"]
    for key, value in (report.environment() | extra).items():
        if key != "date" and found.get(key) != value:
            raise ValueError(f"{path}: expected its {key} to be {value}, got {found.get(key)}")
    return {identity(row): row for row in earlier["rows"]}


def identity(row):
    """What tells rows apart, in the order of the table."""
    return row["batch"], row["implementation"], row["context"]


def parse(arguments=None):
    """The command line."""
    parser = report.Parser(__doc__.splitlines()[0])
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--tiny", action="store_true", help="small dimensions, float32: for a CPU")
    parser.add_argument("--batch", nargs="+", **number, help=f"default: {BATCHES}")
    parser.add_argument("--context", nargs="+", **number, help=f"default: {CONTEXTS}")
    kinds = {"nargs": "+", "choices": ("cuda", "xla")}
    parser.add_argument("--implementation", **kinds, help="default: those that can run here")
    parser.add_argument("--data", default=1, **number, help="pools; default: 1")
    parser.add_argument("--model", default=1, **number, help="devices of a pool; default: 1")
    parser.add_argument("--add", action="store_true", help="keep the JSON's rows of other cases")
    parser.add_argument("--rounds", default=5, **number, help="samples of each time; default: 5")
    parser.add_argument("--calls", default=10, **number, help="in flight; default: 10")
    args = parser.parse_args(arguments)
    batches = TINY_BATCHES if args.tiny else BATCHES
    args.batch = args.batch or [n for n in batches if n % max(args.data, 1) == 0] or batches
    args.context = args.context or (TINY_CONTEXTS if args.tiny else CONTEXTS)
    reason = native.why_no_kernel("decode")
    args.implementation = args.implementation or (["xla"] if reason else ["cuda", "xla"])
    if reason and "cuda" in args.implementation:
        parser.error(f"--implementation: cuda cannot run: {reason}")
    for name in ("batch", "context", "data", "model", "rounds", "calls"):
        if np.min(getattr(args, name)) < 1:
            parser.error(f"--{name}: expected at least 1, got {np.min(getattr(args, name))}")
    if uneven := [batch for batch in args.batch if batch % args.data]:
        parser.error(f"--batch: expected multiples of {args.data} pools, got {uneven[0]}")
    return args


WHAT = (
    "A model with random weights (config: its dimensions): one decode step, a new token for each "
    "of batch sequences of context tokens each. step_us: the jitted step, with several in flight; "
    "tokens_per_s: batch / step_us. attention_us: the plan and all layers' append and decode in a "
    "program of their own; attention_share: attention_us / step_us. without_attention_us: the step "
    "with a sum of the queries in place of the decode. with_host_us: Stepper.decode, one at a "
    "time, which brings the logits to the host. error: why there are no times."
)


def main():
    """Measures, prints, writes `deepseek[_tiny][_<data>x<model>].json`."""
    args = parse()
    fields = TINY if args.tiny else V2_LITE
    config = parse_config(fields)
    extra = {
        "config": fields,
        "mesh": {"data": args.data, "model": args.model},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    name = "deepseek" + "_tiny" * args.tiny
    name += f"_{args.data}x{args.model}" * (args.data * args.model > 1)
    path = pathlib.Path(args.out or report.RESULTS) / f"{name}.json"
    try:
        mesh = steps.make_mesh(args.data, args.model)
        check_divides(config, args.model)
        found = earlier_rows(path, **extra) if args.add else {}
    except ValueError as error:
        sys.exit(str(error))
    start, rows = report.gpu_state(), []
    dtype = jnp.float32 if args.tiny else jnp.bfloat16
    params = draw_params(config, mesh, dtype, jax.random.key(0))
    for batch in args.batch:
        for implementation in args.implementation:
            case = batch, args.context, implementation, args.rounds, args.calls
            new = measure_what_fits(config, params, mesh, *case)
            found |= {identity(row): row for row in new}
            rows = [found[key] for key in sorted(found)]
            report.write(name, WHAT, rows, args.out, start, done=False, **extra)
    report.write(name, WHAT, rows, args.out, start, **extra)
    columns = ["batch", "context", "implementation", "tokens_per_s", "attention_share"]
    times = ["step_us", "attention_us", "without_attention_us", "with_host_us"]
    cells = [
        [row.get(c, "") for c in columns]
        + [f"{row[t]['median']:,.0f}" if t in row else row["error"] for t in times]
        for row in rows
    ]
    report.print_table("decode steps of the whole model, µs", [*columns, *times], cells)


if __name__ == "__main__":
    main()
