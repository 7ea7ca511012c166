"""Decode on several GPUs: `python -m benchmarks.sharded`.

Programs of many decodes, on a mesh of all GPUs of the host and on one of them, each with its part
of the work and with all of it: how close sharing the heads, or sequences with pools of their own,
comes to perfect scaling; what context parallelism gains for one long sequence; and what it costs a
program that its decodes are partitioned. Needs several Hopper GPUs and the native module.
"""

import functools
import sys

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from benchmarks import report
from benchmarks.cases import make_case
from benchmarks.operands import make_operands
from benchmarks.timing import chained, time_wall
from jax_flashmla import context_parallel, flash_mla_with_kvcache

LAYERS = 61  # DeepSeek-V3's: a step is long enough to launch the next one meanwhile
ROUNDS = 7
CALLS = 10
LONG = 131_072  # tokens of the one sequence of context parallelism


def layers(decode):
    """A program of `LAYERS` decodes, each with the outputs of the one before as its queries."""

    def run(q, *rest):
        for _ in range(LAYERS):
            out, _ = decode(q, *rest)
            q = q.at[..., :512].set(out)
        return q

    return run


decode = functools.partial(flash_mla_with_kvcache, implementation="cuda")


def time_programs(programs):
    """Microseconds per layer of each `name: (function, operands)`, in turns."""
    samples = {name: [] for name in programs}
    runs = {name: chained(fun, *args) for name, (fun, args) in programs.items()}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            samples[name].append(time_wall(run, calls=CALLS) / LAYERS)
    return {f"{name}_us": report.summary(values) for name, values in samples.items()}


def share_heads(mesh, batch, heads, tokens):
    """Each device has some of the heads, and the whole pool."""
    q, *rest = make_operands(make_case(batch, 1, heads, tokens))
    replicated = jax.device_put(rest, jax.NamedSharding(mesh, P()))
    sharded = jax.device_put(q, jax.NamedSharding(mesh, P(None, None, "x")))
    part = q[:, :, : heads // mesh.size]
    return {
        "all_gpus": (layers(decode), (sharded, *replicated)),
        "part_on_one": (layers(decode), (part, *rest)),
        "whole_on_one": (layers(decode), (q, *rest)),
    }


def share_sequences(mesh, batch, heads, tokens):
    """A pool for each device, with its part of the sequences."""
    part = make_operands(make_case(batch // mesh.size, 1, heads, tokens))
    stacked = [jnp.broadcast_to(x, (mesh.size, *x.shape)) for x in part]
    sharded = jax.device_put(stacked, jax.NamedSharding(mesh, P("x")))
    return {
        "all_gpus": (layers(decode), sharded),
        "part_on_one": (layers(decode), part),
    }


def share_keys(mesh, heads):
    """One long sequence, its pages dealt out to the devices."""
    q, pool, table, lengths = make_operands(make_case(1, 1, heads, LONG))
    pages = LONG // 64 // mesh.size
    pools = jnp.reshape(pool[table[0]], (pages, mesh.size, *pool.shape[1:])).swapaxes(0, 1)
    local_table = jnp.arange(pages, dtype=jnp.int32)[None]

    def body(q, pools, table, lengths):
        part = functools.partial(context_parallel.decode, axis_name="x", implementation="cuda")
        return layers(part)(q, pools[0], table, lengths)

    spread = jax.shard_map(body, mesh=mesh, in_specs=(P(), P("x"), P(), P()), out_specs=P())
    replicated = jax.NamedSharding(mesh, P())
    operands = (
        jax.device_put(q, replicated),
        jax.device_put(pools, jax.NamedSharding(mesh, P("x"))),
        jax.device_put(local_table, replicated),
        jax.device_put(lengths, replicated),
    )
    return {
        "all_gpus": (spread, operands),
        "whole_on_one": (layers(decode), (q, pool, table, lengths)),
    }


def measure(mesh, what, programs):
    """Returns a row of the report."""
    row = {"what": what} | time_programs(programs)
    everywhere = row["all_gpus_us"]["median"]
    if "part_on_one_us" in row:
        part = row["part_on_one_us"]["median"]
        row["efficiency"] = round(part / everywhere, 3)
        row["added_us"] = round(everywhere - part, 2)
    if "whole_on_one_us" in row:
        row["speedup"] = round(row["whole_on_one_us"]["median"] / everywhere, 2)
    return row


def main():
    """Measures, prints, writes sharded_<number of GPUs>.json."""
    directory = report.output_directory(__spec__.name, __doc__, "decode")
    gpus = jax.devices("gpu")
    if len(gpus) < 2:
        sys.exit("benchmarks.sharded compares several GPUs with one, and there is one here.")
    mesh = jax.make_mesh(
        (len(gpus),), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=gpus
    )
    rows = [
        measure(mesh, "heads: 64 sequences x 128 heads x 4,096", share_heads(mesh, 64, 128, 4096)),
        measure(mesh, "heads: 1 sequence x 128 heads x 4,096", share_heads(mesh, 1, 128, 4096)),
        measure(
            mesh,
            "a pool each: 128 sequences x 16 heads x 4,096",
            share_sequences(mesh, 128, 16, 4096),
        ),
        measure(
            mesh, "a pool each: 8 sequences x 16 heads x 4,096", share_sequences(mesh, 8, 16, 4096)
        ),
        measure(mesh, f"keys: 1 sequence x 16 heads x {LONG:,}", share_keys(mesh, 16)),
        measure(mesh, f"keys: 1 sequence x 128 heads x {LONG:,}", share_keys(mesh, 128)),
    ]
    what = (
        f"Programs of {LAYERS} decodes in a row, wall time per decode, several calls in flight, "
        "the queries of each the donated results of the one before: "
        "all_gpus_us the work shared by all GPUs, part_on_one_us one device's part of it on one, "
        "whole_on_one_us all of it on one. efficiency: part_on_one / all_gpus; added_us: their "
        "difference, which is what partitioning costs; speedup: whole_on_one / all_gpus."
    )
    report.write(f"sharded_{len(gpus)}", what, rows, directory, gpus=len(gpus))
    columns = ["all_gpus_us", "part_on_one_us", "whole_on_one_us"]
    report.print_table(
        f"{len(gpus)} GPUs, µs a decode",
        ["what", *columns, "efficiency", "added", "speedup"],
        [
            [
                row["what"],
                *(f"{row[key]['median']:.1f}" if key in row else "" for key in columns),
                *(row.get(key, "") for key in ("efficiency", "added_us", "speedup")),
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
