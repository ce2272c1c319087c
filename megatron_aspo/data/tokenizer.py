"""Loading a model's tokenizer."""

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_aspo.data.model_directory import resolve_model
from megatron_aspo.data.sentencepiece_bpe import order_merges_by_score
from megatron_aspo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "tiktoken.model")


def load_tokenizer(model: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a local Hugging Face directory (tokenizer.json or SentencePiece tokenizer.model) or of a hub name.

    Code that comes with a model is never run. Raises UserError if the model or its tokenizer is missing or cannot be read.
    """
    from transformers import AutoTokenizer

    directory = resolve_model(model)
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"model={model} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); copy the tokenizer's files into it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # the Rust tokenizers library raises bare Exception for a damaged file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model={model}: its tokenizer cannot be loaded ({reason}); check the tokenizer's files") from error
    if (directory / "tokenizer.model").is_file() and not (directory / "tokenizer.json").is_file():
        order_merges_by_score(tokenizer, directory / "tokenizer.model")
    return tokenizer
