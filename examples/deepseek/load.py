"""A checkpoint's directory as a stepper, a tokenizer and a configuration."""

import json
import os
import pathlib

import jax.numpy as jnp
import numpy as np

from examples.deepseek.steps import Stepper, load_stepper, make_mesh

TOKENIZER = "tokenizer.json"


def load(
    directory,
    *,
    max_batch: int,
    num_pages: int,
    max_tokens: int,
    data: int = 1,
    model_axis: int = 1,
    implementation: str | None = None,
    dtype="bfloat16",
):
    """Loads a model and its tokenizer.

    Args:
      directory: in the published layout: `config.json`, safetensors files, `tokenizer.json`.
      max_batch: rows of a decode, of all pools.
      num_pages: of each pool.
      max_tokens: of a sequence.
      data: page pools, a mesh axis.
      model_axis: devices that share a pool's work, the other one.
      implementation: of `flash_mla_with_kvcache`.
      dtype: of the parameters, "bfloat16" or "float32".

    Returns:
      A `steps.Stepper`, a `transformers.PreTrainedTokenizerFast` and a `config.Config`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: one of them is malformed, or the mesh does not fit.
    """
    directory = pathlib.Path(directory)
    tokenizer = load_tokenizer(directory)  # first: it takes no time to miss
    mesh = make_mesh(data, model_axis)
    stepper = load_stepper(
        directory,
        dtype=jnp.dtype(dtype),
        mesh=mesh,
        max_batch=max_batch,
        num_pages=num_pages,
        max_blocks=-(-max_tokens // Stepper.page_size),
        implementation=implementation,
    )
    if len(tokenizer) > stepper.vocab_size:
        raise ValueError(
            f"{directory / TOKENIZER}: expected at most config.json's {stepper.vocab_size} tokens, "
            f"got {len(tokenizer)}"
        )
    return stepper, tokenizer, stepper.config


def load_tokenizer(directory):
    """The tokenizer as its file has it, whatever class its configuration names.

    Returns:
      A `transformers.PreTrainedTokenizerFast`.

    Raises:
      FileNotFoundError: there is no `tokenizer.json`.
      ValueError: it is malformed.
    """
    # Or the library warns that it has no PyTorch, which a tokenizer does not need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    directory = pathlib.Path(directory)
    if not (directory / TOKENIZER).is_file():
        raise FileNotFoundError(
            f"{directory / TOKENIZER}: expected a tokenizer, found no such file"
        )
    try:
        return PreTrainedTokenizerFast.from_pretrained(directory)
    except Exception as error:  # the library raises plain `Exception` for some malformed files
        raise ValueError(f"{directory / TOKENIZER}: {error}") from error


def warm_up(stepper) -> None:
    """Compiles the steps for every length of a chunk, or the first requests would wait for it.

    To be called before there are requests: it writes into the first pages.
    """
    table = np.arange(stepper.max_blocks, dtype=np.int32) % stepper.num_pages
    longest = min(stepper.prefill_chunk, stepper.max_blocks * stepper.page_size)
    count = 1
    while True:
        count = min(count, longest)
        stepper.prefill([0] * count, 0, table)
        if count == longest:
            break
        count *= 2
    rows = np.zeros(stepper.max_batch, np.int32)  # of padding
    stepper.decode(rows, np.zeros((stepper.max_batch, stepper.max_blocks), np.int32), rows)


def end_tokens(directory) -> frozenset[int]:
    """The end-of-sequence tokens that `generation_config.json` and `config.json` name."""
    found = set()
    for name in ("generation_config.json", "config.json"):
        path = pathlib.Path(directory) / name
        if path.is_file():
            named = json.loads(path.read_text()).get("eos_token_id")
            found.update([named] if isinstance(named, int) else named or ())
    return frozenset(found)
