"""Tokenizer files with which `AutoTokenizer` gives users of an exported model the tokens that it was trained on."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, cast

from megatron_aspo.common.errors import UserError
from megatron_aspo.common.import_path import one_line
from megatron_aspo.data.tokenizer import TOKENIZER_FILES, load_tokenizer, probe_texts, reading
from megatron_aspo.data.tokenizer_probes import first_difference

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_CONFIG = "tokenizer_config.json"


def tokenizer_files(model_directory: Path, tokenizer: "PreTrainedTokenizerBase", chat_template: str) -> tuple[dict[str, str], str]:
    """Return name → content of the files that replace the model's own in an export, and a warning or "".

    tokenizer: the one that training used. chat_template: the one that `data.chat_template` named, else empty. Where `AutoTokenizer` would
    read the model's files differently from training, `tokenizer.json` is written and `tokenizer_class` set to the class-less wrapper's.
    For some model types (Qwen's) AutoTokenizer ignores this and takes a class of its own, which the warning reports.
    """
    files = {"chat_template.jinja": chat_template} if chat_template else {}
    if not _auto_difference(model_directory, tokenizer):
        return files, ""
    config = model_directory / _CONFIG
    values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    exact = {
        "tokenizer.json": cast("Tokenizer", tokenizer.backend_tokenizer).to_str(pretty=True) + "\n",
        _CONFIG: json.dumps(values | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2, ensure_ascii=False) + "\n",
    }
    with tempfile.TemporaryDirectory() as name:
        trial = Path(name)
        for file in model_directory.iterdir():
            if file.is_file() and file.suffix in (".json", ".jinja", ".txt") and not file.name.endswith(".index.json"):
                shutil.copyfile(file, trial / file.name)
        for file, content in exact.items():
            (trial / file).write_text(content, encoding="utf-8")
        difference = _auto_difference(trial, tokenizer)
    if not difference:
        return files | exact, ""
    return files | exact, (
        f"AutoTokenizer does not read this model's tokenizer.json as it is: {difference}. Load it with "
        "PreTrainedTokenizerFast.from_pretrained(…), as training did"
    )


def auto_tokenizer_note(directory: Path) -> str:
    """Describe in one line how AutoTokenizer misreads the tokenizer of a converted model; empty if it does not, or if there is none."""
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return ""
    try:
        difference = _auto_difference(directory, load_tokenizer(directory))
    except UserError as error:
        return str(error)
    return difference and f"AutoTokenizer does not read this model's tokenizer as its files say: {difference}"


def _auto_difference(directory: Path, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Describe where AutoTokenizer reads `directory` differently from `tokenizer`, special tokens around the text included."""
    from transformers import AutoTokenizer

    try:
        auto = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        return f"it fails ({one_line(error)})"
    # Only tokenizers of the Rust library can list their tokens and write a tokenizer.json.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return first_difference(reading(tokenizer, special=True), reading(auto, special=True), probe_texts(backend)) if backend else ""
