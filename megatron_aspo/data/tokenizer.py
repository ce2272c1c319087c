"""Loading of a model's tokenizer: exactly the one that its files describe, or an error.

transformers 5 does not read `tokenizer.json` unchanged. `AutoTokenizer` takes the vocabulary and merges from it and rebuilds normalizer,
pre-tokenizer and decoder for the class that `tokenizer_config.json` names, or for the model type. For a byte-level file under
`LlamaTokenizerFast` this loses every space, without a warning (transformers#45488). Here the file's own tokenizer is the truth: it is
loaded through transformers' class-less wrapper, and the two are compared on probe texts.
"""

import json
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from megatron_aspo.common.errors import UserError, first_line
from megatron_aspo.data.sentencepiece_bpe import repair_sentencepiece
from megatron_aspo.data.tokenizer_probes import PROBES, Reading, first_difference
from megatron_aspo.hf.model_directory import resolve_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "tiktoken.model")


def load_tokenizer(model: str | Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a local Hugging Face directory or of a hub name.

    `tokenizer.json` takes precedence. Without one, a SentencePiece `tokenizer.model` is compared with the SentencePiece library, and other
    files are read by the class that `tokenizer_config.json` names and must round-trip the probe texts. Code that comes with a model is
    never run. Raises UserError if the model or its tokenizer is missing or damaged, or if no class of transformers reproduces the tokens
    and the text that the files describe; the error shows the first text that differs.
    """
    directory = resolve_model(model)
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"model={model} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); copy the tokenizer's files into it")
    try:
        tokenizer = _from_json(directory) if (directory / "tokenizer.json").is_file() else _from_older_files(directory)
    except UserError:
        raise
    except Exception as error:  # the Rust tokenizers library raises bare Exception for a damaged file
        raise UserError(f"model={model}: its tokenizer cannot be loaded ({first_line(error)}); check the tokenizer's files") from error
    # "Cleaning up" deletes spaces before punctuation from the text that the reward sees.
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def reading(tokenizer: "PreTrainedTokenizerBase", special: bool = False) -> Reading:
    """Return how a transformers tokenizer reads text. special: whether it adds its special tokens around a text."""
    return Reading(
        encode=lambda text: tokenizer(text, add_special_tokens=special)["input_ids"],
        decode=lambda ids: cast(str, tokenizer.decode(ids, clean_up_tokenization_spaces=False)),
        tokens=lambda ids: cast(list[str], tokenizer.convert_ids_to_tokens(ids)),
    )


def probe_texts(tokenizer: "Tokenizer") -> tuple[str, ...]:
    """Return PROBES and a text that contains every added token, like a rendered chat."""
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    return (*PROBES, "".join(f"{token}user\nhi 12{token} \n" for token in added))


def _from_json(directory: Path) -> "PreTrainedTokenizerBase":
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file = Tokenizer.from_file(str(directory / "tokenizer.json"))
    # A file may keep the truncation and padding settings it was saved with; transformers applies neither unless requested.
    file.no_truncation()
    file.no_padding()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    expected = Reading(
        encode=lambda text: file.encode(text, add_special_tokens=False).ids,
        decode=lambda ids: file.decode(ids, skip_special_tokens=False),
        tokens=lambda ids: [str(file.id_to_token(number)) for number in ids],
    )
    if difference := first_difference(expected, reading(tokenizer), probe_texts(file)):
        raise UserError(
            f"{directory}/tokenizer.json: transformers reads another tokenizer, since tokenizer_config.json changes it: {difference}; "
            "correct added_tokens_decoder, the special tokens and split_special_tokens in tokenizer_config.json"
        )
    return tokenizer


def _from_older_files(directory: Path) -> "PreTrainedTokenizerBase":
    import transformers

    # The named class itself, because for some model types AutoTokenizer takes a different one.
    named = _named_class(directory)
    tokenizer_class = getattr(transformers, named or "AutoTokenizer", None)
    if tokenizer_class is None:
        raise UserError(
            f"{directory}/tokenizer_config.json: transformers has no tokenizer class {named}; add the model's tokenizer.json, or correct "
            "tokenizer_class"
        )
    tokenizer = tokenizer_class.from_pretrained(directory, trust_remote_code=False)
    ours = reading(tokenizer)
    if (directory / "tokenizer.model").is_file():
        repair_sentencepiece(tokenizer, ours, directory / "tokenizer.model", legacy=_config(directory).get("legacy") is not False)
        return tokenizer
    for text in PROBES:
        if (back := ours.decode(ours.encode(text))) not in (text, unicodedata.normalize("NFC", text)):
            raise UserError(
                f"{directory}: read as {type(tokenizer).__name__}, its tokenizer turns {text!r} into {back!r}; add the model's "
                "tokenizer.json, or correct tokenizer_class in tokenizer_config.json"
            )
    return tokenizer


def _config(directory: Path) -> dict[str, Any]:
    file = directory / "tokenizer_config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _named_class(directory: Path) -> str:
    """Return the class that tokenizer_config.json names, without `Fast`; empty if it names none or only the class-less wrapper."""
    name = _config(directory).get("tokenizer_class")
    return "" if name in (None, "PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend") else name.removesuffix("Fast")
