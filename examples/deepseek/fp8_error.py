"""What an FP8 cache costs a model's logits: `python -m examples.deepseek.fp8_error DIR`.

Decodes the same texts, token by token, from pools of bfloat16, and from pools in `FP8_BLOCK`, and
compares the logits. `DIR` is a checkpoint, such as `train_tiny` makes.
"""

import pathlib

import jax.numpy as jnp
import numpy as np

from benchmarks import report
from examples.deepseek.load import load_tokenizer
from examples.deepseek.steps import load_stepper

ROWS, PROMPT, STEPS = 8, 128, 64


def texts(tokenizer):
    """Token ids `[ROWS, PROMPT + STEPS]`, from this repository's documentation."""
    root = pathlib.Path(__file__).parent.parent.parent
    text = "\n".join(path.read_text() for path in sorted((root / "docs").glob("*.md")))
    ids = np.asarray(tokenizer.encode(text))
    length = PROMPT + STEPS
    starts = np.linspace(0, len(ids) - length, ROWS).astype(int)
    return np.stack([ids[start : start + length] for start in starts]).astype(np.int32)


def run(directory, tokens, **options):
    """Logits of every step, float32 `[STEPS, ROWS, vocabulary]`: each is given the text's token."""
    pages = -(-tokens.shape[1] // 64)
    stepper = load_stepper(
        directory, max_batch=ROWS, num_pages=ROWS * pages, max_blocks=pages, **options
    )
    tables = np.arange(ROWS * pages, dtype=np.int32).reshape(ROWS, pages)
    for row, table in enumerate(tables):
        stepper.prefill(tokens[row, :PROMPT], 0, table)
    lengths = np.arange(PROMPT + 1, PROMPT + STEPS + 1, dtype=np.int32)
    return np.stack(
        [stepper.decode(tokens[:, n - 1], tables, np.full(ROWS, n, np.int32)) for n in lengths]
    )


def compare(name, got, want):
    """A row of the report."""
    likely, theirs = (_log_softmax(x.astype(np.float64)) for x in (want, got))
    divergence = (np.exp(likely) * (likely - theirs)).sum(-1)
    off = got.astype(np.float64) - want
    return {
        "cache": name,
        "logits_rms": float(f"{_rms(off) / _rms(want - want.mean(-1, keepdims=True)):.4g}"),
        "kl_mean": float(f"{divergence.mean():.4g}"),
        "kl_max": float(f"{divergence.max():.4g}"),
        "same_token": float(f"{(got.argmax(-1) == want.argmax(-1)).mean():.4g}"),
    }


def _log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _rms(x):
    return np.sqrt(np.mean(np.square(x)))


def main():
    """Measures, prints, writes fp8_deepseek.json."""
    parser = report.Parser(__doc__.splitlines()[0])
    parser.add_argument("checkpoint", metavar="DIR", help="with the model and its tokenizer")
    args = parser.parse_args()
    tokens = texts(load_tokenizer(args.checkpoint))
    # float32 weights and activations: what is left is what the caches lose.
    want = run(args.checkpoint, tokens, dtype=jnp.float32, attention="plain")
    rows = [
        compare(name, run(args.checkpoint, tokens, dtype=jnp.float32, fp8_cache=fp8), want)
        for name, fp8 in (("bfloat16", False), ("fp8_block", True))
    ]
    what = (
        "Logits of a model that reads its cache in each format, against float32 pools; weights and "
        "activations in float32. logits_rms: root mean square of the difference over that of the "
        "logits around their mean; kl_mean, kl_max: divergence of the next token's distribution, "
        "in nats; same_token: how often the most likely token is the same. "
        f"{ROWS} texts, {PROMPT} tokens of prefill and {STEPS} of decode."
    )
    report.write("fp8_deepseek", what, rows, args.out)
    report.print_table(
        "logits from FP8 caches", list(rows[0]), [[*map(str, row.values())] for row in rows]
    )


if __name__ == "__main__":
    main()
