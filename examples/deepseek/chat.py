"""Talks with a model in a terminal: python -m examples.deepseek.chat --model DIR.

Enter ends a message, Ctrl-C an answer, Ctrl-D the program; /new begins a new conversation. With
--complete every line is a text to go on with, and nothing is remembered: for models that have not
learned to chat.
"""

import argparse
import sys
import time

from rich.console import Console
from rich.text import Text as Styled

from examples.deepseek import options
from examples.deepseek.errors import InvalidRequestError
from examples.deepseek.request import Options
from examples.deepseek.runner import Runner
from examples.deepseek.tokenization import Text


def printable(text: str) -> str:
    """Without control characters, with which a model could do what it likes to a terminal."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def answer(prompt: list[int], request_options: Options, runner: Runner, console: Console) -> str:
    """Prints an answer as it comes, and returns it. Ctrl-C ends it early.

    Raises:
      InvalidRequestError: the prompt is too long.
    """
    pieces, begin = [], time.perf_counter()
    with runner.stream(prompt, request_options) as stream:
        try:
            for event in stream:
                pieces.append(event.text)
                console.print(Styled(printable(event.text)), end="", soft_wrap=True)
        except KeyboardInterrupt:
            console.print(" (interrupted)", style="dim", end="")
        else:
            if event.error is not None:
                console.print(Styled(f"\nthe request failed: {event.error}"), style="red", end="")
    request = stream.request
    rate = len(request.generated) / (time.perf_counter() - begin)
    console.print(
        f"\n[{len(request.generated)} tokens, {rate:.1f} a second, {request.cached_tokens or 0} of "
        f"{len(prompt)} prompt tokens were in the cache]",
        style="dim",
        markup=False,
        highlight=False,
    )
    return "".join(pieces)


def converse(args, request_options: Options, runner: Runner, text: Text, console: Console) -> None:
    """Reads lines and answers them, until the end of the input."""
    system = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(system)
    while True:
        try:
            line = console.input("[bold]> [/bold]" if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line.strip() == "/new":
            messages = list(system)
            continue
        if not line.strip():
            continue
        asked = [*messages, {"role": "user", "content": line}]
        try:
            prompt = text.encode(line) if args.complete else text.encode_chat(asked)
            said = answer(prompt, request_options, runner, console)
        except InvalidRequestError as error:
            hint = "" if args.complete or not messages else " (/new begins a new conversation)"
            console.print(Styled(f"{error}{hint}"), style="red")
            continue
        messages = [*asked, {"role": "assistant", "content": said}]


def main(arguments=None):
    """Chats until the end of the input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_model_options(parser)
    options.add_sampling_options(parser, temperature=0.7)
    parser.add_argument("--system", help="a message that a conversation begins with")
    parser.add_argument("--complete", action="store_true", help="go on with texts, do not chat")
    args = parser.parse_args(arguments)
    options.request_options(parser, args)  # before the model is loaded
    console = Console(highlight=False)
    with console.status("loading"):
        runner, text, _ = options.load_engine(parser, args)
    with runner:
        stop = () if args.complete else text.chat_stop
        converse(args, options.request_options(parser, args, stop), runner, text, console)


if __name__ == "__main__":
    main()
