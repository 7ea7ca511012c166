"""What FP8 caches cost in accuracy: `python -m benchmarks.fp8_accuracy`.

Decodes from a bfloat16 cache and from the same rows in the FP8 formats, and compares with attention
over the unquantized rows in float64. It measures numbers, not time: any machine gives the same, up
to the draw of the rows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from jax_flashmla import FP8_BLOCK, FP8_PER_TENSOR, flash_mla_with_kvcache, quantize_kv_cache

BATCH, HEADS, TOKENS = 4, 16, 2048
DRAWS = 5
OUTLIER_COLUMNS = 8  # of the 512 latent ones

FORMATS = {
    "bfloat16": None,
    "fp8_per_tensor": functools.partial(quantize_kv_cache, format=FP8_PER_TENSOR),
    "fp8_block": functools.partial(quantize_kv_cache, format=FP8_BLOCK),
    "fp8_block, powers of two": functools.partial(
        quantize_kv_cache, format=FP8_BLOCK, power_of_two_scales=True
    ),
}
# What the outlier columns of the rows are multiplied with.
ROWS = {"Gaussian": 1, "outliers x 30": 30, "outliers x 1000": 1000, "outliers x 30000": 30000}


def draw(rng, gain):
    """Queries `[b, 1, h, 576]`, rows `[b, tokens, 1, 576]`, and the columns without outliers.

    Queries are divided by what rows are multiplied with, so that scores are as those of Gaussian
    rows: of variance 1.
    """
    gains = np.ones(576, np.float32)
    outliers = rng.choice(512, OUTLIER_COLUMNS, replace=False)
    gains[outliers] = gain
    rows = rng.standard_normal((BATCH, TOKENS, 1, 576), np.float32) * gains
    q = rng.standard_normal((BATCH, 1, HEADS, 576), np.float32) / gains
    return q.astype(jnp.bfloat16), rows.astype(jnp.bfloat16), np.delete(np.arange(512), outliers)


def reference(q, rows):
    """out `[b, 1, h, 512]` and lse `[b, h, 1]`, in float64."""
    q, rows = (np.asarray(x, np.float64) for x in (q, rows))
    scores = np.einsum("bshd,btgd->bhst", q, rows) * 576**-0.5
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    out = np.einsum("bhst,btgv->bshv", weights / total, rows[..., :512])
    return out, (top + np.log(total))[..., 0]


@jax.jit
def decode(q, k_cache, k_scale, lengths):
    """From an unpaged cache."""
    return flash_mla_with_kvcache(q, k_cache, None, lengths, k_scale=k_scale)


def errors(rng, gain):
    """Errors of each format for one draw of rows."""
    q, rows, ordinary = draw(rng, gain)
    want_out, want_lse = reference(q, rows)
    lengths = jnp.full(BATCH, TOKENS, jnp.int32)
    found = {}
    for name, quantize in FORMATS.items():
        k_cache, k_scale = quantize(rows) if quantize else (rows, None)
        out, lse = (np.asarray(x, np.float64) for x in decode(q, k_cache, k_scale, lengths))
        off = out - want_out
        found[name] = {
            "out_rms": _rms(off) / _rms(want_out),
            "ordinary_rms": _rms(off[..., ordinary]) / _rms(want_out[..., ordinary]),
            "out_max": np.abs(off[..., ordinary]).max() / _rms(want_out[..., ordinary]),
            "lse_max": np.abs(lse - want_lse).max(),
        }
    return found


def _rms(x):
    return np.sqrt(np.mean(np.square(x)))


def measure(kind, gain):
    """Rows of the report, one for each format."""
    draws = [errors(np.random.default_rng(seed), gain) for seed in range(DRAWS)]
    rows = []
    for name in FORMATS:
        row = {"rows": kind, "format": name}
        for key in draws[0][name]:
            samples = [float(f"{found[name][key]:.4g}") for found in draws]
            row[key] = {"median": float(np.median(samples)), "samples": samples}
        rows.append(row)
    return rows


def main():
    """Measures, prints, writes fp8_accuracy.json."""
    directory = report.Parser(__doc__).parse_args().out
    rows = [row for kind, gain in ROWS.items() for row in measure(kind, gain)]
    what = (
        "Error of MLA decode with bfloat16 queries from a cache in each format, against attention "
        "over the unquantized bfloat16 rows in float64: out_rms, root mean square over that of the "
        "output; ordinary_rms, the same over the columns without outliers; out_max, the largest "
        "over the root mean square, in these columns; lse_max, the largest of the log-sum-exps. "
        f"{BATCH} sequences of {TOKENS} tokens, {HEADS} heads; scores of variance 1. Outliers: "
        f"{OUTLIER_COLUMNS} of the latent columns are multiplied with 30 or more, and the queries' "
        f"divided. Median of {DRAWS} draws."
    )
    report.write("fp8_accuracy", what, rows, directory)
    keys = "out_rms", "ordinary_rms", "out_max", "lse_max"
    report.print_table(
        "errors of decode from FP8 caches",
        ["rows", "format", *keys],
        [
            [row["rows"], row["format"], *(f"{row[key]['median']:.2e}" for key in keys)]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
