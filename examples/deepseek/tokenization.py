"""Prompts to tokens and tokens to text, by the tokenizer of a checkpoint."""

import copy
from collections.abc import Sequence

from examples.deepseek.errors import InvalidRequestError

# For tokenizers without a chat template:
#
#   You are helpful.        <- system messages, as they are
#
#   User: Hello!
#
#   Assistant: Hi.
#
#   User: How are you?
#
#   Assistant:
#
# where an answer ends when the model begins the user's next turn.
TURNS = {"system": "", "user": "User: ", "assistant": "Assistant: "}
NEXT_TURN = "\n\nUser:"


class Text:
    """What serving needs of a tokenizer. Its methods may be called from several threads.

    Attributes:
      eos: ids of tokens that end a sequence.
      chat_stop: strings that end an answer in a chat, besides.
    """

    def __init__(self, tokenizer, eos: Sequence[int] = ()):
        """Wraps a `transformers` tokenizer with a Rust backend.

        Args:
          tokenizer: a `transformers.PreTrainedTokenizerFast`.
          eos: end-of-sequence tokens besides the tokenizer's own.
        """
        # Of its own: encoding for another caller may change a backend's settings meanwhile.
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._tokenizer = tokenizer
        own = tokenizer.eos_token_id
        self.eos = frozenset(eos) | (frozenset() if own is None else {own})
        self.chat_stop = () if tokenizer.chat_template else (NEXT_TURN,)

    def encode(self, text: str, field: str = "prompt") -> list[int]:
        """Token ids, with the special tokens that the tokenizer puts around a text.

        Raises:
          InvalidRequestError: it is no Unicode text; the message names `field`.
        """
        return self._encode(text, field, add_special_tokens=True)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text, without special tokens."""
        return self._backend.decode(tokens, skip_special_tokens=True)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins.

        By the tokenizer's chat template, or as shown above if it has none.

        Args:
          messages: dictionaries with "role" ("system", "user" or "assistant") and "content".

        Raises:
          InvalidRequestError: the template refuses them.
        """
        if self._tokenizer.chat_template:
            try:
                text = self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
            except Exception as error:  # a template may raise what it likes
                raise InvalidRequestError("messages", f"the chat template says: {error}") from error
            return self._encode(text, "messages", add_special_tokens=False)
        turns = [_turn(**message) for message in messages]
        return self._encode("\n\n".join([*turns, "Assistant:"]), "messages", True)

    def _encode(self, text, field, add_special_tokens):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(field, f"expected Unicode text: {error}") from error
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids


def _turn(role, content):
    # An answer as the model gave it begins with the space behind "Assistant:".
    return TURNS[role] + (content.removeprefix(" ") if role == "assistant" else content)
