"""Command-line options that chat, batch and server share."""

import argparse
import contextlib
import os
import pathlib

import jax

from examples.deepseek import load
from examples.deepseek.attention import PAGE
from examples.deepseek.engine import Engine
from examples.deepseek.errors import InvalidRequestError, is_out_of_memory
from examples.deepseek.request import Options
from examples.deepseek.runner import Runner
from examples.deepseek.sampling import Sampling
from examples.deepseek.tokenization import Text
from jax_flashmla import native


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, how much of it, and where."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", type=pathlib.Path, required=True, metavar="DIR", help="checkpoint and tokenizer"
    )
    group.add_argument(
        "--max-batch", type=positive, default=8, help="sequences of a decode (default: %(default)s)"
    )
    group.add_argument(
        "--num-pages", type=positive, help="of 64 tokens, of each pool (default: for --max-batch "
        "sequences of --max-tokens)"
    )  # fmt: skip
    group.add_argument(
        "--max-tokens", type=positive, default=4096, help="of a sequence (default: %(default)s)"
    )
    group.add_argument("--data", type=positive, default=1, help="page pools, a mesh axis")
    group.add_argument("--model-axis", type=positive, default=1, help="devices for each pool")
    group.add_argument("--implementation", choices=["cuda", "xla"], help="of the decode")
    group.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")


def load_engine(
    parser: argparse.ArgumentParser, args: argparse.Namespace, *, warm_up: bool = False
) -> tuple[Runner, Text, str]:
    """Loads what the options name: the running engine, the tokenizer, the model's name.

    A checkpoint that cannot be loaded, devices without the memory for it, or a decode that cannot
    run here end the program with what is wrong.
    """
    reason = native.why_no_kernel("decode")
    if reason and args.implementation == "cuda":
        parser.error(f"--implementation: cuda cannot run: {reason}")
    num_pages = args.num_pages or -(-args.max_batch // args.data) * -(-args.max_tokens // PAGE)
    with _memory_ends(parser, num_pages):
        try:
            eos = load.end_tokens(args.model)  # before the weights
            stepper, tokenizer, config = load.load(
                args.model,
                max_batch=args.max_batch,
                num_pages=num_pages,
                max_tokens=args.max_tokens,
                data=args.data,
                model_axis=args.model_axis,
                implementation=args.implementation,
                dtype=args.dtype,
            )
            text = Text(tokenizer, eos)
        except (OSError, ValueError) as error:
            parser.exit(1, f"{parser.prog}: {error}\n")
        if warm_up:
            load.warm_up(stepper)
    limit = min(args.max_tokens, config.max_position_embeddings)
    return (
        Runner(Engine(stepper, text.decode, eos=text.eos, max_tokens=limit)),
        text,
        os.path.basename(os.path.abspath(args.model)),  # of "." and "..", too
    )


@contextlib.contextmanager
def _memory_ends(parser, num_pages):
    """Where the devices' memory ends, so does the program, and says what takes less of it."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        message = str(error).splitlines()[0]
        parser.exit(
            1,
            f"{parser.prog}: no memory for the model and {num_pages:,} pages a pool: {message}\n"
            "fewer pages: --max-batch, --max-tokens, --num-pages; more devices: --model-axis\n",
        )


def add_sampling_options(parser: argparse.ArgumentParser, temperature: float) -> None:
    """How to choose tokens; `temperature` is the default."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--temperature", type=float, default=temperature, help="0 is greedy (default: %(default)s)"
    )
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--seed", type=int, help="the same one gives the same tokens")
    group.add_argument("--max-new-tokens", type=int, help="default: until the sequence is full")


def request_options(
    parser: argparse.ArgumentParser, args: argparse.Namespace, stop: tuple[str, ...] = ()
) -> Options:
    """A request's options, from the command line's; what is wrong with them ends the program."""
    try:
        sampling = Sampling(args.temperature, args.top_p, args.seed)
        return Options(args.max_new_tokens, sampling, stop)
    except InvalidRequestError as error:
        parser.error(str(error))
