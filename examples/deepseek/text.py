"""Text from tokens, piece by piece: no half characters, and nothing from a stop string on."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
WINDOW = 24  # tokens decoded again with every new one, at most
CONTEXT = 8  # of them kept when the window moves on


class TextStream:
    """The text of one request, as its tokens come.

    A token may end inside a character, and how it reads may depend on those before it. So the last
    few tokens are decoded together with each new one, and what is new is the difference. Held back
    are a trailing replacement character, as which tokenizers over bytes (such as DeepSeek's) read a
    character that is not complete, and what may be the beginning of a stop string.

    Attributes:
      stopped: whether a stop string has come.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()):
        """Starts empty.

        Args:
          decode: token ids to text.
          stop: strings at which the text ends, none of them empty.
        """
        self._decode = decode
        self._stop = tuple(stop)
        self._window: list[int] = []
        self._seen = 0  # characters of the window's text that were taken already
        self._held = ""  # taken, and perhaps the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that `token` completes. Sets `stopped` if it ends in a stop string."""
        self._window.append(token)
        text = self._decode(self._window)
        settled = text.removesuffix(REPLACEMENT)
        piece = self._until_stop(settled[self._seen :])
        self._seen = len(settled)
        if len(self._window) >= WINDOW:
            self._window = self._window[-CONTEXT:]
            # Tokens without text may have moved the character that is not complete out.
            self._seen = max(0, len(self._decode(self._window)) - (len(text) - len(settled)))
        return piece

    def flush(self) -> str:
        """What was held back: the text ends here."""
        text = self._decode(self._window)
        piece = self._until_stop(text[self._seen :])
        self._seen = len(text)
        if self.stopped:
            return piece
        piece, self._held = piece + self._held, ""
        return piece

    def _until_stop(self, new):
        text = self._held + new
        found = [i for i in (text.find(stop) for stop in self._stop) if i >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut]


def _overlap(text, stop):
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
