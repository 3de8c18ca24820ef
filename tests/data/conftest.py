import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|pad|>", "<|end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + ':' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def byte_bpe(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that splits nothing beforehand, so that its merges may cross any boundary."""
    pieces = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(merge) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """The template ends with `a:`; the merge `:` + `S` would join it to a response that begins with `S`."""
    return byte_bpe([(":", "S"), ("u", "r"), ("ur", "e")])
