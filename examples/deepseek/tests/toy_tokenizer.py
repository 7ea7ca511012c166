"""A tokenizer without files: a token for every byte, and two special ones."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 258
BOS, EOS = 256, 257


def byte_backend() -> Tokenizer:
    """As DeepSeek's tokenizers have it, without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return backend


def toy_tokenizer(chat_template=None) -> PreTrainedTokenizerFast:
    """The same for transformers."""
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_backend(),
        bos_token="<s>",
        eos_token="</s>",
        chat_template=chat_template,
    )
