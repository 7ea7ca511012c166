"""The next token of a row of logits: greedy, with a temperature, from the nucleus (top-p)."""

import dataclasses
import reprlib

import numpy as np

from examples.deepseek.errors import InvalidRequestError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose tokens.

    Attributes:
      temperature: 0 is greedy; logits are divided by it otherwise.
      top_p: draws from the fewest most likely tokens whose probabilities add up to at least `top_p`
        (Holtzman et al., arXiv 1904.09751), and those as likely as the last of them.
      seed: of the request's own generator; `None` draws one from the operating system.

    Raises:
      InvalidRequestError: a value is of the wrong type or out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        """Checks types and ranges."""
        check_number("temperature", self.temperature, 0.0, 100.0)
        check_number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise InvalidRequestError("top_p", "expected more than 0, got 0")
        if self.seed is not None:
            check_integer("seed", self.seed, 0, 2**63 - 1)

    def generator(self) -> np.random.Generator:
        """A generator for one request: it alone draws from it, one number for each token."""
        return np.random.default_rng(self.seed)


def check_number(name: str, value, low: float, high: float) -> None:
    """Raises InvalidRequestError unless `value` is a number between the limits (NaN is not)."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise InvalidRequestError(
            name, f"expected a number between {low:g} and {high:g}, got {brief(value)}"
        )


def check_integer(name: str, value, low: int, high: int) -> None:
    """Raises InvalidRequestError unless `value` is an integer between the limits."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequestError(
            name, f"expected an integer between {low} and {high}, got {brief(value)}"
        )


def brief(value) -> str:
    """A value as a short piece of a message."""
    if isinstance(value, int) and abs(value) >= 2**64:
        return "one of more than 64 bits"  # Python refuses to print very long ones
    return reprlib.repr(value)  # whose depth and length are limited


def sample(logits: np.ndarray, sampling: Sampling, generator: np.random.Generator) -> int:
    """Chooses a token.

    Args:
      logits: `[vocab_size]` float32.
      sampling: how.
      generator: the request's own; not used if greedy, else advanced by one number.

    Raises:
      FloatingPointError: a logit is NaN or infinite.
    """
    if not np.isfinite(logits).all():
        raise FloatingPointError("the model gave logits that are NaN or infinite")
    if sampling.temperature == 0:
        return int(np.argmax(logits))
    # Vocabularies are large: 32 bits are enough, and most is done in place.
    weights = logits - logits.max()
    with np.errstate(over="ignore"):  # to -inf, with temperatures near 0: weight 0
        weights *= np.float32(min(1 / sampling.temperature, 1e30))
    np.exp(weights, out=weights)
    tokens = None
    if sampling.top_p < 1:
        whole = weights.sum(dtype=np.float64)
        # Those below the cut cannot add up to what the others may lack: none of them is needed, and
        # few are left to sort.
        cut = (1 - sampling.top_p) * whole / len(weights)
        likely = np.sort(weights[weights >= cut])[::-1].astype(np.float64)
        needed = np.searchsorted(np.cumsum(likely), sampling.top_p * whole)
        tokens = np.flatnonzero(weights >= likely[min(needed, len(likely) - 1)])
        weights = weights[tokens]
    total = weights.astype(np.float64)
    np.cumsum(total, out=total)
    # `random` is 1 - 2**-53 at most, and the product below the sum even when rounded: no token of
    # weight 0 is drawn.
    index = np.searchsorted(total, generator.random() * total[-1], side="right")
    return int(index if tokens is None else tokens[index])
