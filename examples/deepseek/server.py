"""An OpenAI-compatible HTTP endpoint: python -m examples.deepseek.server --model DIR.

`POST /v1/completions` and `/v1/chat/completions`, whole or as server-sent events; `GET /v1/models`;
`GET /health`. There is no authentication: it listens on 127.0.0.1 unless told otherwise.

    curl localhost:8000/v1/completions -d '{"prompt": "Pages are", "stream": true}'
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import secrets
import time

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route

from examples.deepseek import options
from examples.deepseek.errors import EngineClosedError, InvalidRequestError
from examples.deepseek.protocol import Answers, parse_json, parse_query
from examples.deepseek.runner import Runner
from examples.deepseek.sampling import brief
from examples.deepseek.tokenization import Text


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a client may cost.

    Attributes:
      body_bytes: of a request.
      concurrent_requests: that are read, wait or run; those beyond are told to come back later.
      body_seconds: for a body to arrive.
      send_seconds: for a client to take a piece of its answer.
    """

    body_bytes: int = 1 << 20
    concurrent_requests: int = 64
    body_seconds: float = 30.0
    send_seconds: float = 60.0


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(self, status: int, message: str, field: str | None = None, **headers: str):
        """Args: the HTTP status, what the client reads, which field it is about, headers."""
        super().__init__(message)
        self.status, self.field, self.headers = status, field, headers

    def body(self) -> dict:
        """The JSON object."""
        kinds = {404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        error = {"message": str(self), "type": kind, "param": self.field, "code": None}
        return {"error": error}


def make_app(runner: Runner, text: Text, model: str, limits: Limits | None = None) -> Starlette:
    """The ASGI application. Its end closes the runner.

    Args:
      runner: the engine.
      text: the tokenizer.
      model: the name that it is served under.
      limits: what a client may cost.
    """
    limits = limits or Limits()
    slots = Slots(limits.concurrent_requests)
    started = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(app):
        yield
        await asyncio.to_thread(runner.close)

    async def models(request):
        entry = {"id": model, "object": "model", "created": started, "owned_by": "jax_flashmla"}
        return json_response(200, {"object": "list", "data": [entry]})

    async def health(request):
        status = "closed" if runner.closed else "ok"
        report = {"status": status, "requests": slots.taken, **runner.engine.counts}
        return json_response(503 if runner.closed else 200, report)

    async def refuse(request, error):
        answer = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return json_response(answer.status, answer.body(), error.headers)

    parts = (runner, text, model, limits, slots)
    return Starlette(
        routes=[
            Route("/v1/completions", Endpoint(*parts, chat=False), methods=["POST"]),
            Route("/v1/chat/completions", Endpoint(*parts, chat=True), methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
        ],
        exception_handlers={HTTPException: refuse},
        lifespan=lifespan,
    )


class Slots:
    """Counts the requests at hand; used in the event loop only."""

    def __init__(self, limit: int):
        """Starts with none taken."""
        self.limit, self.taken = limit, 0

    @contextlib.contextmanager
    def one(self):
        """Takes a slot. Raises ApiError if there is none."""
        if self.taken >= self.limit:
            raise ApiError(
                429, f"expected at most {self.limit} requests at a time", **{"Retry-After": "1"}
            )
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1


class Endpoint:
    """One of the two `POST` routes, as an ASGI application.

    One coroutine from the body's first byte to the answer's last: however it ends, its request is
    cancelled, if it is not done, and its slot is free.
    """

    def __init__(self, runner, text, model, limits, slots, *, chat):
        """See `make_app`; `chat`: which of the two."""
        self._runner, self._text, self._model = runner, text, model
        self._limits, self._slots, self._chat = limits, slots, chat

    async def __call__(self, scope, receive, send):
        """Answers."""
        try:
            with self._slots.one():
                await self._serve(scope, receive, send)
        except ApiError as error:
            await json_response(error.status, error.body(), error.headers)(scope, receive, send)
        except Gone:
            return  # there is nobody to answer

    async def _serve(self, scope, receive, send):
        try:
            query = await self._read(scope, receive)
            stream = self._runner.async_stream(query.prompt, query.options)
        except InvalidRequestError as error:
            raise ApiError(400, str(error), error.field) from error
        except EngineClosedError as error:
            raise ApiError(503, str(error)) from error
        answers = Answers(query, self._model, secrets.token_hex(12))
        with stream:
            if query.stream:
                work = self._send_events(stream, answers, send)
            else:
                work = self._send_whole(stream, answers, scope, send)
            await unless_gone(work, receive)

    async def _read(self, scope, receive):
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                data = await read_body(scope, receive, self._limits.body_bytes)
        except TimeoutError as error:
            seconds = self._limits.body_seconds
            raise ApiError(408, f"expected the body within {seconds:g} s") from error
        body = parse_json(data)
        if body.get("model", self._model) not in (self._model, None):
            raise ApiError(
                404, f"model: expected {self._model}, got {brief(body['model'])}", "model"
            )
        # Long prompts take a while: not in the event loop.
        defaults = {} if self._chat else {"max_tokens": 16}  # as in OpenAI's API
        return await asyncio.to_thread(
            parse_query, body, self._text, chat=self._chat, defaults=defaults
        )

    async def _send_whole(self, stream, answers, scope, send):
        text = []
        async for event in stream:
            check(event)
            text.append(event.text)
        answer = answers.whole("".join(text), event.finish_reason, stream.request)
        await json_response(200, answer)(scope, None, self._within_time(send))

    async def _send_events(self, stream, answers, send):
        send = self._within_time(send)
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def put(data, more=True):
            body = f"data: {data}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        if (first := answers.first_chunk()) is not None:
            await put(json.dumps(first))
        try:
            async for event in stream:
                check(event)
                if event.text or event.finish_reason:
                    await put(json.dumps(answers.chunk(event.text, event.finish_reason)))
            if (last := answers.last_chunk(stream.request)) is not None:
                await put(json.dumps(last))
        except ApiError as error:  # too late for a status
            await put(json.dumps(error.body()))
        await put("[DONE]", more=False)

    def _within_time(self, send):
        """`send`, which raises Gone if the client does not take what it is sent."""

        async def send_in_time(message):
            try:
                async with asyncio.timeout(self._limits.send_seconds):
                    await send(message)
            except TimeoutError as error:
                raise Gone from error

        return send_in_time


class Gone(Exception):  # noqa: N818, an everyday event and not a fault
    """The client has hung up, or does not read."""


def check(event):
    """Raises ApiError if the event is the end of a request that failed."""
    if event.finish_reason in ("error", "cancelled"):
        status = 503 if isinstance(event.error, EngineClosedError) else 500
        raise ApiError(status, f"the request failed: {event.error or 'it was cancelled'}")


def json_response(status, content, headers=None):
    """A response of ASCII: JSON has escapes for the rest, even for what is no Unicode text."""
    return Response(json.dumps(content), status, dict(headers or {}), "application/json")


async def read_body(scope, receive, limit: int) -> bytes:
    """Reads a request's body. Raises ApiError if it is too large, Gone if the client is."""
    too_large = ApiError(413, f"body: expected at most {limit} bytes", "body")
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    data, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        data += message.get("body", b"")
        if len(data) > limit:
            raise too_large
        more = message.get("more_body", False)
    return bytes(data)


async def unless_gone(work, receive):
    """Awaits a coroutine; cancels it and raises Gone if the client hangs up before."""

    async def watch():
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(watch())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise Gone
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def main(arguments=None):
    """Serves until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_model_options(parser)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--name", help="of the model in requests (default: the directory's)")
    parser.add_argument(
        "--max-body", type=options.positive, default=Limits.body_bytes, metavar="BYTES"
    )
    parser.add_argument(
        "--max-requests",
        type=options.positive,
        default=Limits.concurrent_requests,
        help="at a time",
    )
    parser.add_argument(
        "--grace", type=int, default=10, metavar="SECONDS", help="for answers when told to end"
    )
    parser.add_argument(
        "--no-warm-up", action="store_true", help="compile when the first requests need it"
    )
    args = parser.parse_args(arguments)
    runner, text, name = options.load_engine(parser, args, warm_up=not args.no_warm_up)
    limits = Limits(body_bytes=args.max_body, concurrent_requests=args.max_requests)
    app = make_app(runner, text, args.name or name, limits)
    uvicorn.run(app, host=args.host, port=args.port, timeout_graceful_shutdown=args.grace)


if __name__ == "__main__":
    main()
