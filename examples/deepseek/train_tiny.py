"""Trains a tiny model on this repository's text: `python -m examples.deepseek.train_tiny OUT`.

About a minute on two CPU cores. The model has V2-Lite's structure (no query LoRA, softmax routing,
a dense first layer, YaRN) and is saved in the published layout, with its tokenizer: whatever reads
the published checkpoints reads it.
"""

import argparse
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import safetensors.numpy
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.deepseek.config import parse_config
from examples.deepseek.layout import published_shapes, sources
from examples.deepseek.model import bind
from examples.deepseek.presets import TINY
from examples.deepseek.tiny_tokenizer import repository_text, save_tokenizer, train_tokenizer

BATCH, TOKENS = 4, 128
LEARNING_RATE = 3e-3


def draw_weights(config, rng):
    """Tensors of the published layout, float32: norms 1, matrices random."""
    tensors = {}
    for name, shape in published_shapes(config).items():
        if name.endswith("norm.weight"):
            tensors[name] = jnp.ones(shape)
        else:
            tensors[name] = jnp.asarray(rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5)
    return tensors


def forward(config, tensors, tokens):
    """Logits `[b, t, vocabulary]`, by the path that loading takes: from published tensors."""
    params = {
        name: source.assemble([tensors[x] for x in source.names], jnp)
        for name, source in sources(config).items()
    }
    return bind(config, params)(tokens)


def loss_of(config, tensors, tokens):
    """Mean negative log likelihood of each token after the first, in nats."""
    logits = forward(config, tensors, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def make_step(config, optimizer):
    """The jitted `(tensors, state, tokens) -> (tensors, state, loss)`."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(tensors, state, tokens):
        loss, gradients = jax.value_and_grad(functools.partial(loss_of, config))(tensors, tokens)
        updates, state = optimizer.update(gradients, state, tensors)
        return optax.apply_updates(tensors, updates), state, loss

    return step


def draw_batch(text, starts, rng):
    """Pieces of the text, each behind the token that starts a sequence."""
    pieces = text[rng.choice(starts, BATCH)[:, None] + np.arange(TOKENS)]
    return np.concatenate([np.zeros((BATCH, 1), text.dtype), pieces], axis=1)


def encode_text(tokenizer):
    """The repository's text as int32 tokens `[n]`, and where its paragraphs start."""
    tokens, starts = [], []
    for text in repository_text():
        for paragraph in text.split("\n\n"):
            starts.append(len(tokens))
            tokens += tokenizer.encode(paragraph.strip("\n") + "\n\n").ids[1:]
        tokens[-1] = 1
    starts = np.array(starts)
    return np.array(tokens, np.int32), starts[starts + TOKENS <= len(tokens)]


def train(steps, seed=0, progress=None):
    """Trains on the repository's text, from the starts of its paragraphs.

    Returns the tokenizer, the published tensors and the loss of each step.
    """
    rng = np.random.default_rng(seed)
    tokenizer = train_tokenizer(TINY["vocab_size"])
    text, starts = encode_text(tokenizer)
    config = parse_config(TINY)
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, steps // 20, steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.0)
    )
    tensors = draw_weights(config, rng)
    state, step, losses = optimizer.init(tensors), make_step(config, optimizer), []
    for number in range(steps):
        tensors, state, loss = step(tensors, state, draw_batch(text, starts, rng))
        losses.append(float(loss))
        if progress is not None:
            progress(number + 1, losses[-1])
    return tokenizer, tensors, losses


def save(directory, tokenizer, tensors):
    """Writes a checkpoint in the published layout, bfloat16."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(TINY, indent=1) + "\n")
    save_tokenizer(tokenizer, directory)
    stored = {name: np.asarray(x).astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
    safetensors.numpy.save_file(stored, directory / "model.safetensors", {"format": "pt"})


def main():
    """Trains and saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", help="the checkpoint's directory")
    parser.add_argument("--steps", type=int, default=400, help="default: 400")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps: expected at least 1, got {args.steps}")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    begin = time.perf_counter()
    with Progress(*columns, TimeElapsedColumn()) as bar:
        task = bar.add_task("compile", total=args.steps)

        def progress(number, loss):
            bar.update(task, completed=number, description=f"loss {loss:.2f}")

        tokenizer, tensors, losses = train(args.steps, args.seed, progress)
    save(args.out, tokenizer, tensors)
    seconds = time.perf_counter() - begin
    last = np.mean(losses[-10:])
    print(f"loss {losses[0]:.2f} to {last:.2f} in {args.steps} steps, {seconds:.0f} s: {args.out}")


if __name__ == "__main__":
    main()
