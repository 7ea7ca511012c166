"""A small byte-level tokenizer, trained on this repository's text, in the published files' form."""

import json
import pathlib
import re

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
    """The prose of the repository's documentation: no tables, programs, pictures or comments.

    Raises:
      FileNotFoundError: a file is missing.
    """
    names = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "cuda/README.md"]
    paths = [ROOT / name for name in names] + sorted((ROOT / "docs").glob("*.md"))
    texts = []
    for path in paths:
        text = re.sub(r"```.*?```|<!--.*?-->", "", path.read_text(), flags=re.DOTALL)
        lines = [line for line in text.splitlines() if not line.startswith(("|", "    ", "!["))]
        texts.append(re.sub(r"\n{3,}", "\n\n", "\n".join(lines)))
    return texts


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
