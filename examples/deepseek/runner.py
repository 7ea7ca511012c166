"""Runs an engine in a thread of its own, and hands each request's events to whoever reads them."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Iterator, Sequence

from examples.deepseek.engine import Engine
from examples.deepseek.errors import EngineClosedError
from examples.deepseek.request import Event, Options, Request


class Runner:
    """An engine in its thread. A context manager: leaving it ends all requests.

    A step of the model blocks, so it must not run in an event loop. Whatever happens to the thread,
    every request gets a last event: no reader waits for ever.
    """

    def __init__(self, engine: Engine):
        """Starts the thread."""
        self.engine = engine
        self._wake = threading.Event()
        self._lock = threading.Lock()  # between "is it closed?" and "here is a request"
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self):
        """Returns itself."""
        return self

    def __exit__(self, *_):
        """Closes."""
        self.close()

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests: `close` was called, or the thread has failed."""
        return self._closed

    def close(self) -> None:
        """Ends all requests with an error and waits for the step at hand to be over."""
        with self._lock:
            self._closed = True
        self._wake.set()
        self._thread.join()

    def stream(self, prompt: Sequence[int], options: Options) -> "Stream":
        """Submits a request, to be read in another thread than the engine's.

        Raises:
          InvalidRequestError: see `Engine.submit`.
          EngineClosedError: the engine no longer runs.
        """
        events = queue.SimpleQueue()
        return Stream(self.engine, self._submit(prompt, options, events.put), events)

    def async_stream(self, prompt: Sequence[int], options: Options) -> "AsyncStream":
        """As `stream`, to be read in the running event loop."""
        events = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def sink(event):
            loop.call_soon_threadsafe(events.put_nowait, event)

        return AsyncStream(self.engine, self._submit(prompt, options, sink), events)

    def _submit(self, prompt, options, sink):
        with self._lock:
            if self._closed:
                raise EngineClosedError("the engine no longer runs")
            request = self.engine.submit(prompt, options, sink)
        self._wake.set()
        return request

    def _run(self):
        error = EngineClosedError("the engine was closed before the request was done")
        try:
            while not self._closed:
                self._wake.wait()
                self._wake.clear()
                while not self._closed and self.engine.step():
                    pass
        except BaseException as failure:
            error = EngineClosedError(f"the engine failed: {failure!r}")
            raise
        finally:
            with self._lock:
                self._closed = True
            self.engine.abort(error)


class _Reader:
    """A request and its events. A context manager: leaving it cancels what is not done."""

    def __init__(self, engine: Engine, request: Request, events):
        self.request = request
        self._engine = engine
        self._events = events

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.cancel()

    def cancel(self) -> None:
        """Ends the request; of no effect if it is done."""
        self._engine.cancel(self.request)


class Stream(_Reader):
    """The events of a request, for a thread. Leaving its `with` cancels what is not done."""

    def __iter__(self) -> Iterator[Event]:
        """Yields events until the last one."""
        reason = None
        while reason is None:
            event = self._events.get()
            reason = event.finish_reason
            yield event


class AsyncStream(_Reader):
    """The events of a request, for an event loop. Leaving its `with` cancels what is not done."""

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Yields events until the last one."""
        reason = None
        while reason is None:
            event = await self._events.get()
            reason = event.finish_reason
            yield event
