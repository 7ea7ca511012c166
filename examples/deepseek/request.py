"""One request: what was asked for, how far it is, and what its reader is told."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

from examples.deepseek.errors import InvalidRequestError
from examples.deepseek.pages import extend_chain
from examples.deepseek.sampling import Sampling, brief, check_integer
from examples.deepseek.text import TextStream

MAX_STOPS = 16


@dataclasses.dataclass(frozen=True)
class Options:
    """What a request may ask for, besides its prompt.

    Attributes:
      max_tokens: tokens to generate at most; `None`: until the sequence is as long as it may be.
      sampling: how to choose them.
      stop: strings before which the text ends; at most 16, none empty.
      ignore_eos: goes on after an end-of-sequence token.

    Raises:
      InvalidRequestError: a value is of the wrong type or out of range.
    """

    max_tokens: int | None = None
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        """Checks types and ranges."""
        if self.max_tokens is not None:
            check_integer("max_tokens", self.max_tokens, 1, 2**31)
        if not all(isinstance(stop, str) and 0 < len(stop) <= 256 for stop in self.stop):
            raise InvalidRequestError(
                "stop", f"expected strings of 1 to 256 characters, got {brief(self.stop)}"
            )
        if len(self.stop) > MAX_STOPS:
            raise InvalidRequestError(
                "stop", f"expected at most {MAX_STOPS} strings, got {len(self.stop)}"
            )


@dataclasses.dataclass(frozen=True)
class Event:
    """News of a request. The last one has a finish reason.

    Attributes:
      tokens: generated since the event before.
      text: that became certain since then; "" if the engine has no tokenizer.
      finish_reason: "stop" (end of sequence, or a stop string), "length" (`max_tokens`, or the
        longest sequence there can be), "cancelled", "error"; `None` if there is more to come.
      error: what went wrong.
    """

    tokens: tuple[int, ...] = ()
    text: str = ""
    finish_reason: str | None = None
    error: Exception | None = None


class Request:
    """A request in the engine. Only the engine's thread changes it, `cancelled` excepted.

    Attributes:
      number: of its arrival; requests are served in this order.
      prompt, generated: token ids. `tokens`: both.
      stored: how many of `tokens` have their rows in the pages.
      pages: that it holds, in order. chain: the digests of those that are full.
      place: `(pool, row)` while it has pages; `None` while it waits.
      cached_tokens: of the prompt, found in other requests' pages when it was admitted first.
      evictions: how often it had to give its pages back and start again.
      finish_reason: as the last event's.
    """

    def __init__(
        self,
        number: int,
        prompt: Sequence[int],
        options: Options,
        sink: Callable[[Event], None],
        decode: Callable[[Sequence[int]], str] | None,
    ):
        """Starts waiting. `sink` and `decode` are as in `Engine.submit` and `Engine`."""
        self.number = number
        self.prompt = list(prompt)
        self.options = options
        self.cancelled = False
        self.tokens = list(prompt)
        self.stored = 0
        self.pages: list[int] = []
        self.chain: list[bytes] = []
        self.place: tuple[int, int] | None = None
        self.cached_tokens: int | None = None
        self.evictions = 0
        self.finish_reason: str | None = None
        self.generator = options.sampling.generator()
        self._sink = sink
        self._text = None if decode is None else TextStream(decode, options.stop)

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[len(self.prompt) :]

    def digests(self, page_size: int) -> list[bytes]:
        """The chain of all full pages of `tokens`."""
        extend_chain(self.chain, self.tokens, page_size)
        return self.chain

    def append(self, token: int, eos: frozenset[int], limit: int) -> None:
        """Takes a token, and tells the reader; sets `finish_reason` if it is the last one."""
        self.tokens.append(token)
        text, reason = "", None
        count = len(self.tokens) - len(self.prompt)
        if token in eos and not self.options.ignore_eos:
            reason = "stop"
        elif count == self.options.max_tokens or len(self.tokens) >= limit:
            reason = "length"
        if self._text is not None:
            # The end-of-sequence token has no text, whatever the tokenizer says.
            text = "" if reason == "stop" else self._text.push(token)
            if reason is not None and not self._text.stopped:
                text += self._text.flush()
            if self._text.stopped:
                reason = "stop"
        self.finish_reason = reason
        self._sink(Event((token,), text, reason))

    def end(self, reason: str, error: Exception | None = None) -> None:
        """Ends it without a token. What a reader does with the news cannot harm anybody else."""
        self.finish_reason = reason
        with contextlib.suppress(Exception):
            self._sink(Event(finish_reason=reason, error=error))
