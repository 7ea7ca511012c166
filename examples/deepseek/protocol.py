"""What the HTTP endpoint and the batch mode read and write: OpenAI's requests and responses.

The fields are those of OpenAI's API reference for completions and chat completions, as far as this
engine has what they ask for; those it has not are refused by name.
"""

import dataclasses
import json
import math
import time

from examples.deepseek.errors import InvalidRequestError
from examples.deepseek.request import MAX_STOPS, Options
from examples.deepseek.sampling import Sampling, brief
from examples.deepseek.tokenization import TURNS, Text

COMMON_FIELDS = (
    "ignore_eos", "max_tokens", "model", "seed", "stop", "stream", "stream_options",
    "temperature", "top_p",
)  # fmt: skip
# Of no effect on an answer.
IGNORED_FIELDS = ("metadata", "service_tier", "store", "user")
# Not supported; these values, as JSON, ask for nothing.
NEUTRAL_VALUES = {
    "best_of": ("1",),
    "echo": ("false",),
    "frequency_penalty": ("0", "0.0"),
    "functions": ("[]",),
    "logit_bias": ("{}",),
    "logprobs": ("false", "0"),
    "n": ("1",),
    "presence_penalty": ("0", "0.0"),
    "response_format": ('{"type": "text"}',),
    "suffix": ('""',),
    "tools": ("[]",),
    "top_logprobs": ("0",),
}


@dataclasses.dataclass(frozen=True)
class Query:
    """A request's body, checked.

    Attributes:
      prompt: token ids.
      options: for the engine.
      chat: whether it has messages instead of a prompt.
      stream: whether the answer is to come as server-sent events.
      include_usage: whether these end with the counts of tokens.
    """

    prompt: list[int]
    options: Options
    chat: bool
    stream: bool
    include_usage: bool


def parse_json(data: bytes) -> dict:
    """The object that a JSON text is.

    Raises:
      InvalidRequestError: it is none. NaN and infinities, which JSON has not, are refused, too.
    """

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    def finite(text):
        number = float(text)
        return number if math.isfinite(number) else refuse("a number above 1e308")

    try:
        body = json.loads(data, parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise InvalidRequestError("body", f"expected JSON: {str(error) or 'too deep'}") from error
    if not isinstance(body, dict):
        raise InvalidRequestError("body", f"expected a JSON object, got {brief(body)}")
    return body


def parse_query(body: dict, text: Text, *, chat: bool, defaults: dict) -> Query:
    """Checks a body and encodes its prompt.

    Args:
      body: of `/v1/chat/completions` if `chat`, else of `/v1/completions`.
      text: the tokenizer.
      chat: which of the two.
      defaults: of fields that are absent or null.

    Raises:
      InvalidRequestError: the message begins with the field at fault.
    """
    body = defaults | {name: value for name, value in body.items() if value is not None}
    own_fields = ("messages", "max_completion_tokens") if chat else ("prompt",)
    for name, value in body.items():
        if name in NEUTRAL_VALUES:
            if json.dumps(value) not in NEUTRAL_VALUES[name]:
                raise InvalidRequestError(name, f"not supported, got {brief(value)}")
        elif name not in (*COMMON_FIELDS, *own_fields, *IGNORED_FIELDS):
            raise InvalidRequestError(brief(name), "there is no such field")

    max_tokens = body.get("max_completion_tokens", body.get("max_tokens"))
    stop = body.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list):
        raise InvalidRequestError(
            "stop", f"expected a string or a list of strings, got {brief(stop)}"
        )
    chat_stop = text.chat_stop if chat else ()
    if len(stop) > MAX_STOPS - len(chat_stop):
        raise InvalidRequestError(
            "stop", f"expected at most {MAX_STOPS - len(chat_stop)} strings, got {len(stop)}"
        )
    options = Options(
        max_tokens=max_tokens,
        sampling=Sampling(body.get("temperature", 1.0), body.get("top_p", 1.0), body.get("seed")),
        stop=(*stop, *chat_stop),
        ignore_eos=_boolean(body, "ignore_eos"),
    )
    stream_options = body.get("stream_options", {})
    if not isinstance(stream_options, dict):
        raise InvalidRequestError(
            "stream_options", f"expected an object, got {brief(stream_options)}"
        )
    _check_fields(stream_options, ("include_usage",), "stream_options")
    return Query(
        prompt=text.encode_chat(_messages(body)) if chat else _prompt(body, text),
        options=options,
        chat=chat,
        stream=_boolean(body, "stream"),
        include_usage=_boolean(stream_options, "include_usage"),
    )


def _check_fields(value, own, where):
    """Refuses other fields of an object inside the body, unless they say nothing."""
    for name in value:
        if name not in own and value[name]:
            field = f"{where}[{brief(name)}]"
            raise InvalidRequestError(field, f"not supported, got {brief(value[name])}")


def _boolean(body, name):
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise InvalidRequestError(name, f"expected true or false, got {brief(value)}")
    return value


def _prompt(body, text):
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return text.encode(prompt)
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return prompt
    raise InvalidRequestError(
        "prompt", f"expected a string or a list of token ids, got {brief(prompt)}"
    )


def _messages(body):
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequestError("messages", f"expected a list of some, got {brief(messages)}")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _message(where, message):
    if not isinstance(message, dict):
        raise InvalidRequestError(where, f"expected an object, got {brief(message)}")
    _check_fields(message, ("role", "content"), where)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in TURNS:
        raise InvalidRequestError(
            f"{where}.role", f"expected {', '.join(TURNS)}, got {brief(role)}"
        )
    if isinstance(content, list):
        for i, part in enumerate(content):
            is_text = isinstance(part, dict) and part.get("type") == "text"
            if not is_text or not isinstance(part.get("text"), str):
                raise InvalidRequestError(
                    f"{where}.content[{i}]",
                    f'expected {{"type": "text", "text": "..."}}, got {brief(part)}',
                )
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise InvalidRequestError(f"{where}.content", f"expected a string, got {brief(content)}")
    return {"role": role, "content": content}


def usage(request) -> dict:
    """Counts of tokens of an engine's request."""
    prompt, completion = len(request.prompt), len(request.generated)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": request.cached_tokens or 0},
    }


class Answers:
    """Makes the JSON objects of the answers to one query."""

    def __init__(self, query: Query, model: str, identifier: str):
        """Args: the query, the model's name, and the answer's."""
        self._query = query
        kind = "text_completion"
        if query.chat:
            kind = "chat.completion.chunk" if query.stream else "chat.completion"
        self._head = {
            "id": ("chatcmpl-" if query.chat else "cmpl-") + identifier,
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, finish_reason: str, request) -> dict:
        """The answer in one object."""
        message = {"message": {"role": "assistant", "content": text}}
        return self._object(message if self._query.chat else {"text": text}, finish_reason) | {
            "usage": usage(request)
        }

    def first_chunk(self) -> dict | None:
        """What a stream begins with: the role, in a chat."""
        if not self._query.chat:
            return None
        return self._object({"delta": {"role": "assistant", "content": ""}}, None)

    def chunk(self, text: str, finish_reason: str | None) -> dict:
        """A piece of the answer."""
        delta = {"delta": {"content": text} if text or not finish_reason else {}}
        return self._object(delta if self._query.chat else {"text": text}, finish_reason)

    def last_chunk(self, request) -> dict | None:
        """The counts, if they were asked for."""
        if not self._query.include_usage:
            return None
        return self._head | {"choices": [], "usage": usage(request)}

    def _object(self, content, finish_reason):
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
        return self._head | {"choices": [choice]}
