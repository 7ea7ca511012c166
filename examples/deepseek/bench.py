"""Decode of a whole model with random weights: `python -m examples.deepseek.bench`.

DeepSeek-V2-Lite's true dimensions, weights drawn on the device, caches full of random rows: time of
a decode step against batch and context, for the library's CUDA kernels and for XLA, and the share
of it that attention takes. `--tiny` has small dimensions, for a CPU; `--model 4` divides heads,
experts and columns over 4 devices.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from benchmarks import report
from benchmarks.timing import time_wall
from examples.deepseek import steps
from examples.deepseek.attention import PAGE, Step, append, attend_with_flash_mla
from examples.deepseek.config import LATENT_DIM, ROPE_DIM, parse_config
from examples.deepseek.layout import sources
from examples.deepseek.model import abstract_model
from examples.deepseek.presets import TINY, V2_LITE
from examples.deepseek.rope import softmax_scale
from jax_flashmla import get_mla_metadata, native

BATCHES, CONTEXTS = (1, 8, 32, 128), (1024, 4096, 16384)
TINY_BATCHES, TINY_CONTEXTS = (1, 4), (64, 256)


@dataclasses.dataclass(frozen=True)
class Case:
    """What a row of the report measures."""

    batch: int
    context: int  # tokens of every sequence, the new one included
    implementation: str


def draw_params(config, mesh, dtype, key):
    """Random parameters on the mesh, each drawn where it lies."""
    shapes = abstract_model(config, jnp.dtype(dtype))[2]
    params = {}
    for name, source in sources(config).items():
        shape, sharding = shapes[name], jax.NamedSharding(mesh, source.spec)
        key, used = jax.random.split(key)
        params[name] = _draw(shape.shape, shape.dtype, name.endswith("scale"), sharding)(used)
    return params


@functools.cache
def _draw(shape, dtype, ones, sharding):
    def draw(key):
        if ones:
            return jnp.ones(shape, dtype)
        fan_in = shape[-1] if len(shape) == 1 else shape[-2]
        return (jax.random.normal(key, shape, dtype) * fan_in**-0.5).astype(dtype)

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
    """Pools of random rows of unit variance, in place of empty ones."""
    draw = jax.jit(
        lambda pool, key: jax.random.normal(key, pool.shape, pool.dtype),
        donate_argnums=0,
        out_shardings=caches[0].sharding,
    )
    return [draw(pool, jax.random.key(i)) for i, pool in enumerate(caches)]


def make_attention(config, mesh, implementation):
    """All layers' attention and nothing else: the plan, and each layer's append and decode.

    `(queries, rows, caches, block_table, cache_seqlens)` to the sum of the outputs, and the caches.
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


def measure(config, params, mesh, case, rounds, calls):
    """A row of the report."""
    pools = mesh.shape["data"]
    blocks = -(-case.context // PAGE)
    stepper = steps.Stepper(
        config,
        params,
        max_batch=case.batch,
        num_pages=blocks * case.batch // pools,
        max_blocks=blocks,
        mesh=mesh,
        implementation=case.implementation,
    )
    caches, stepper.caches = fill(stepper.caches), None
    operands = tokens, tables, lengths = make_operands(stepper, case.context)
    without = steps.make_decode(config, mesh, skip_attention, case.implementation)
    attention = make_attention(config, mesh, case.implementation)
    keys = jax.random.split(jax.random.key(1), 3)
    rows = (case.batch, config.num_attention_heads)
    dtype = caches[0].dtype
    q_nope = jax.random.normal(keys[0], (*rows, LATENT_DIM), dtype)
    q_rope = jax.random.normal(keys[1], (*rows, ROPE_DIM), dtype)
    new = jax.random.normal(keys[2], (*tokens.shape, 1, LATENT_DIM + ROPE_DIM), dtype)

    samples = {}
    samples["step_us"], caches = timed(
        lambda x: stepper._decode(params, x, *operands), caches, calls, rounds
    )
    samples["without_attention_us"], caches = timed(
        lambda x: without(params, x, *operands), caches, calls, rounds
    )
    samples["attention_us"], caches = timed(
        lambda x: attention(q_nope, q_rope, new, x, tables, lengths), caches, calls, rounds
    )
    stepper.caches = caches
    host = [np.asarray(x).reshape(case.batch, *x.shape[2:]) for x in operands]
    samples["with_host_us"] = [
        time_wall(lambda: stepper.decode(*host), calls=1) for _ in range(rounds)
    ]
    row = dataclasses.asdict(case) | {k: report.summary(v) for k, v in samples.items()}
    step, alone = row["step_us"]["median"], row["attention_us"]["median"]
    row["tokens_per_s"] = round(case.batch / step * 1e6, 1)
    row["attention_share"] = round(alone / step, 3)
    return row


def parse(arguments=None):
    """The command line."""
    parser = report.Parser(__doc__.splitlines()[0])
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--tiny", action="store_true", help="small dimensions, float32: for a CPU")
    parser.add_argument("--batch", nargs="+", **number, help=f"default: {BATCHES}")
    parser.add_argument("--context", nargs="+", **number, help=f"default: {CONTEXTS}")
    parser.add_argument("--implementation", nargs="+", choices=("cuda", "xla"))
    parser.add_argument("--data", default=1, **number, help="pools; default: 1")
    parser.add_argument("--model", default=1, **number, help="devices of a pool; default: 1")
    parser.add_argument("--rounds", default=5, **number, help="samples of each time; default: 5")
    parser.add_argument("--calls", default=10, **number, help="in flight; default: 10")
    args = parser.parse_args(arguments)
    args.batch = args.batch or (TINY_BATCHES if args.tiny else BATCHES)
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
    "time, which brings the logits to the host."
)


def main():
    """Measures, prints, writes `deepseek[_tiny][_<data>x<model>].json`."""
    args = parse()
    mesh = steps.make_mesh(args.data, args.model)
    config = parse_config(TINY if args.tiny else V2_LITE)
    start, rows = report.gpu_state(), []
    dtype = jnp.float32 if args.tiny else jnp.bfloat16
    params = draw_params(config, mesh, dtype, jax.random.key(0))
    name = "deepseek" + "_tiny" * args.tiny
    name += f"_{args.data}x{args.model}" * (mesh.size > 1)
    extra = {
        "config": TINY if args.tiny else V2_LITE,
        "mesh": dict(mesh.shape),
        "pallas_ragged_dot": jax.config.jax_ragged_dot_use_gpu_pallas_triton_lowering,
    }
    for batch in args.batch:
        for context in args.context:
            for implementation in args.implementation:
                case = Case(batch, context, implementation)
                rows.append(measure(config, params, mesh, case, args.rounds, args.calls))
                print(f"{case}: {rows[-1]['step_us']['median']:,.0f} µs", flush=True)
                report.write(name, WHAT, rows, args.out, start, done=False, **extra)
    report.write(name, WHAT, rows, args.out, start, **extra)
    times = "step_us", "attention_us", "without_attention_us", "with_host_us"
    columns = ["batch", "context", "implementation", "tokens_per_s", "attention_share"]
    report.print_table(
        "decode steps of the whole model, µs",
        [*columns, *times],
        [
            [*(row[c] for c in columns), *(f"{row[t]['median']:,.0f}" for t in times)]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
