"""Answers a file of requests: python -m examples.deepseek.batch --model DIR in.jsonl out.jsonl.

A line of the input is the body of a request to `/v1/completions`, or with "messages" to
`/v1/chat/completions`, and may have an "id"; its defaults are the command line's. For each line, in
the same order, the output has one with the line's number, its "id" if it has one, and "text",
"finish_reason" and "usage"; or "error", if it could not be answered, which harms no other line.
"""

import argparse
import collections
import json
import pathlib
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.deepseek import options
from examples.deepseek.errors import EngineClosedError, InvalidRequestError
from examples.deepseek.protocol import parse_json, parse_query, usage
from examples.deepseek.runner import Runner, Stream
from examples.deepseek.tokenization import Text

WINDOW = 4  # times the rows of a decode: lines that are read ahead of the one to be written


def answer_lines(lines, runner: Runner, text: Text, defaults: dict):
    """Answers requests, many at a time.

    Args:
      lines: an iterable of JSON objects as bytes; empty ones are skipped.
      runner: the engine.
      text: its tokenizer.
      defaults: fields of requests that have them not.

    Yields:
      A dictionary for each line, in order; see above.
    """
    window = WINDOW * runner.engine.stepper.max_batch
    under_way = collections.deque()
    try:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if len(under_way) == window:
                yield _result(*under_way.popleft())
            under_way.append(_submit(number, line, runner, text, defaults))
        while under_way:
            yield _result(*under_way.popleft())
    finally:
        for _, stream in under_way:
            if stream is not None:
                stream.cancel()


def _submit(number, line, runner, text, defaults) -> tuple[dict, Stream | None]:
    """The beginning of a line's result, and its events unless it is an error already."""
    record = {"line": number}
    try:
        body = parse_json(line)
        if "id" in body:
            record["id"] = body.pop("id")
        query = parse_query(body, text, chat="messages" in body, defaults=defaults)
        return record, runner.stream(query.prompt, query.options)
    except (InvalidRequestError, EngineClosedError) as error:
        return record | {"error": str(error)}, None


def _result(record, stream):
    if stream is None:
        return record
    pieces = []
    for event in stream:
        pieces.append(event.text)
    if event.error is not None:
        return record | {"error": f"the request failed: {event.error}"}
    return record | {
        "text": "".join(pieces),
        "finish_reason": event.finish_reason,
        "usage": usage(stream.request),
    }


def main(arguments=None):
    """Answers the file; exits with 1 if a line could not be answered."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    options.add_model_options(parser)
    options.add_sampling_options(parser, temperature=0.0)
    args = parser.parse_args(arguments)
    options.request_options(parser, args)  # checks them
    defaults = {
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
        "max_tokens": args.max_new_tokens,
    }
    if args.output.exists() and args.input.exists() and args.output.samefile(args.input):
        parser.error("output: expected another file than the input")
    if args.output.is_dir() or not args.output.parent.is_dir():
        parser.error(f"output: expected a file in an existing directory, got {args.output}")

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    try:
        source = args.input.open("rb")
    except OSError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    with source:
        count = None  # of a pipe's lines
        if source.seekable():
            count = sum(bool(line.strip()) for line in source)
            source.seek(0)
        runner, text, _ = options.load_engine(parser, args)
        done = failed = 0
        with (
            runner,
            # An "id" may be no Unicode text; its escape is JSON's.
            args.output.open("w", encoding="utf-8", errors="backslashreplace") as output,
            Progress(*columns, TimeElapsedColumn(), console=console) as progress,
        ):
            task = progress.add_task(args.input.name, total=count)
            for result in answer_lines(source, runner, text, defaults):
                done += 1
                failed += "error" in result
                output.write(json.dumps(result, ensure_ascii=False) + "\n")
                output.flush()
                progress.advance(task)
    console.print(f"{done} lines, {failed} of them not answered", highlight=False)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
