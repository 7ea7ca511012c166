"""A small byte-level tokenizer, trained on this repository's text, in the published files' form."""

import json
import pathlib

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

ROOT = pathlib.Path(__file__).resolve().parents[2]
# As in the published tokenizers: full-width bars and a low block for the space.
BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
)


def repository_text() -> list[str]:
    """The repository's Markdown files, in the order of their names."""
    hidden = (".", "build", "dist", "bazel-")
    paths = [
        path
        for path in sorted(ROOT.rglob("*.md"))
        if not any(part.startswith(hidden) for part in path.relative_to(ROOT).parts[:-1])
    ]
    if not paths:
        raise FileNotFoundError(f"{ROOT}: expected Markdown files to train on, found none")
    return [path.read_text() for path in paths]


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte pairs of the repository's text; a sequence starts with the token 0, and 1 ends it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(repository_text(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 0)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, which `AutoTokenizer` reads."""
    directory = pathlib.Path(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
