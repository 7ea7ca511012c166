"""A checkpoint's directory as a stepper, a tokenizer and a configuration."""

import json
import os
import pathlib

import jax.numpy as jnp
import numpy as np
from tokenizers import processors

from examples.deepseek.config import read_config
from examples.deepseek.steps import Stepper, check_batch, load_stepper, make_mesh

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
    # First what takes no time to miss: weights take long.
    tokenizer, vocab_size = load_tokenizer(directory), read_config(directory).vocab_size
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"{directory / TOKENIZER}: expected at most config.json's {vocab_size} tokens, "
            f"got {len(tokenizer)}"
        )
    mesh = make_mesh(data, model_axis)
    check_batch(max_batch, data)
    stepper = load_stepper(
        directory,
        dtype=jnp.dtype(dtype),
        mesh=mesh,
        max_batch=max_batch,
        num_pages=num_pages,
        max_blocks=-(-max_tokens // Stepper.page_size),
        implementation=implementation,
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
    path = directory / TOKENIZER
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a tokenizer, found no such file")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    except Exception as error:  # the library raises plain `Exception` for some malformed files
        raise ValueError(f"{path}: {error}") from error
    # Some files leave the first token to the class that the configuration names.
    adds_bos = _field(directory / "tokenizer_config.json", "add_bos_token")
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    if adds_bos and tokenizer.backend_tokenizer.encode("").ids != [bos[1]]:
        if bos[0] is None:
            raise ValueError(f"{directory}: add_bos_token is set, and there is no bos_token")
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos[0]} $A", special_tokens=[bos]
        )
    return tokenizer


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
        named = _field(pathlib.Path(directory) / name, "eos_token_id")
        found.update([named] if isinstance(named, int) else named or ())
    return frozenset(found)


def _field(path, name):
    """A field of a JSON file, None if there is no such field or file."""
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(fields).__name__}")
    return fields.get(name)
