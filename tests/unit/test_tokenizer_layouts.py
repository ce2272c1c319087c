"""Tokenizer files as distributed with models: the loaded tokenizer gives the files' tokens and text, or is refused.

The truth comes from other libraries: `tokenizers` reads tokenizer.json and vocab.json with merges.txt, SentencePiece reads tokenizer.model.
"""

import json
import shutil
from pathlib import Path

import mistral_common
import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.encoder import PromptEncoder
from megatron_aspo.data.tokenizer import load_tokenizer
from megatron_aspo.data.tokenizer_export import tokenizer_files
from megatron_aspo.tasks.options import DataOptions

SENTENCEPIECE_MODEL = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
SPECIALS = ["<pad>", BOS, EOS, USER, ASSISTANT, "<|im_start|>", "<|im_end|>", "<think>"]
TEXTS = [
    "x  12",
    "for i in range(10):\n    if i % 2:\n\t\tprint(f'{i:03d}')\n\n\n    return 1234567.89\r\n",
    "The quick brown  fox   isn't   here;   don't 'quote' \"it\".\n\n \n\t\nEnd  ",
    "Größe naïve 日本語のテキスト Привет мир مرحبا 🙂🙂🙂 e\u0301 １２３",
    f"{BOS}{USER}What is 2 + 2?{ASSISTANT}<think>\n4{EOS}<|im_start|>user\n a<|im_end|>\n",
]
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = LLAMA3.replace("{1,3}", "")
DEEPSEEK_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)


def as_dictionary(content: str) -> dict:
    """Return a special token in transformers 4's format of tokenizer_config.json."""
    return {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def split(regex: str) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), byte_level])


def byte_level(pre_tokenizer, normalizer=None, bos_first=False) -> Tokenizer:
    """Return a byte-level BPE of 800 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*TEXTS, "the number of apples  and   pears\n" * 3] * 4, trainer)
    if bos_first:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 1)])
    return tokenizer


def sentencepiece_json() -> Tokenizer:
    """Return the SentencePiece model as a tokenizer.json, like that of Llama 2 and Mixtral: written here from its pieces and scores."""
    library = SentencePieceProcessor(model_file=str(SENTENCEPIECE_MODEL))
    pieces = [library.id_to_piece(i) for i in range(library.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    scored = [i for i in vocab.values() if not library.is_byte(i) and not library.is_control(i)]
    scored.sort(key=lambda i: -library.get_score(i))
    merges = [(pieces[i][:k], pieces[i][k:]) for i in scored for k in range(1, len(pieces[i]))]
    merges = [(a, b) for a, b in merges if a in vocab and b in vocab]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.fixture(scope="module")
def made() -> dict[str, Tokenizer]:
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    extended = byte_level(split(QWEN), normalizers.NFC())
    extended.add_tokens([AddedToken("<tool>", special=False), AddedToken("</tool>", special=False, lstrip=True)])
    truncating = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    truncating.enable_truncation(8)
    truncating.enable_padding(length=16)
    return {
        "digits": byte_level(digits),
        "gpt2": byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
        "llama3": byte_level(split(LLAMA3), bos_first=True),
        "qwen": byte_level(split(QWEN), normalizers.NFC()),
        "deepseek": byte_level(split(QWEN), bos_first=True),
        "extended": extended,
        "truncating": truncating,
        "sentencepiece": sentencepiece_json(),
    }


@pytest.fixture
def write(tmp_path, made):
    """Write a model's tokenizer files; return the directory."""

    def write(kind: str, model_type: str, tokenizer_class: str | None, **config) -> Path:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        config = {"bos_token": "<s>", "eos_token": "</s>"} if kind == "sentencepiece" else {"bos_token": BOS, "eos_token": EOS, **config}
        if tokenizer_class:
            config["tokenizer_class"] = tokenizer_class
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        made[kind].save(str(tmp_path / "tokenizer.json"))
        return tmp_path

    return write


# tokenizer.json's kind, model type, tokenizer_class. AutoTokenizer misreads those marked ✗.
LAYOUTS = [
    ("digits", "llama", "PreTrainedTokenizerFast"),
    ("digits", "llama", "LlamaTokenizerFast"),  # ✗ deepseek-math, deepseek-llm, xLAM
    ("digits", "llama", "GPT2Tokenizer"),  # ✗
    ("digits", "qwen2", "GPT2Tokenizer"),  # ✗
    ("gpt2", "llama", "GPT2TokenizerFast"),
    ("gpt2", "llama", "Qwen2Tokenizer"),  # ✗
    ("gpt2", "mixtral", "LlamaTokenizer"),
    ("llama3", "llama", "LlamaTokenizer"),  # ✗ DeepSeek-R1-Distill-Llama
    ("llama3", "llama", None),
    ("llama3", "qwen3", "PreTrainedTokenizerFast"),  # ✗
    ("qwen", "qwen2", "Qwen2Tokenizer"),
    ("extended", "qwen3_moe", "Qwen2Tokenizer"),
    ("truncating", "llama", "PreTrainedTokenizerFast"),
    ("sentencepiece", "llama", "LlamaTokenizerFast"),
    ("sentencepiece", "mixtral", "LlamaTokenizer"),
    ("sentencepiece", "qwen2", "LlamaTokenizer"),  # ✗
]


@pytest.mark.parametrize(("kind", "model_type", "tokenizer_class"), LAYOUTS)
def test_tokens_and_text_match_tokenizer_json(write, kind, model_type, tokenizer_class):
    directory = write(kind, model_type, tokenizer_class)
    file = Tokenizer.from_file(str(directory / "tokenizer.json"))
    file.no_truncation()
    file.no_padding()
    tokenizer = load_tokenizer(directory)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == file.encode(text, add_special_tokens=False).ids
        assert tokenizer(text)["input_ids"] == file.encode(text).ids
        assert tokenizer.decode(ids) == file.decode(ids, skip_special_tokens=False)
        assert tokenizer.batch_decode([ids], skip_special_tokens=True) == [file.decode(ids)]


def test_the_papers_base_model_loads_as_its_files_say(write, made):
    """DeepSeek-R1-Distill-Qwen-1.5B: a class other than its model type's, special tokens as dictionaries, a template that opens <think>."""
    directory = write(
        "deepseek",
        "qwen2",
        "LlamaTokenizerFast",
        bos_token=as_dictionary(BOS),
        eos_token=as_dictionary(EOS),
        pad_token=as_dictionary(EOS),
        unk_token=None,
        add_bos_token=True,
        add_eos_token=False,
        legacy=True,
        sp_model_kwargs={},
        clean_up_tokenization_spaces=False,
        model_max_length=16384,
        chat_template=DEEPSEEK_TEMPLATE,
    )
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.bos_token, tokenizer.eos_token_id) == (BOS, SPECIALS.index(EOS))
    encoder = PromptEncoder(tokenizer, 800, DataOptions())
    chat = f"{BOS}{USER}  What is 12 + 7?\n{ASSISTANT}<think>\n"
    ids = encoder.chat([{"role": "user", "content": "  What is 12 + 7?\n"}])
    assert list(ids) == made["deepseek"].encode(chat, add_special_tokens=False).ids
    assert list(encoder.text("What is  12?")) == made["deepseek"].encode("What is  12?").ids
    assert encoder.text("What is  12?")[0] == SPECIALS.index(BOS)


def test_tokenizer_json_wins_over_a_sentencepiece_model_beside_it(write, made):
    directory = write("digits", "llama", "LlamaTokenizer")
    shutil.copy(SENTENCEPIECE_MODEL, directory / "tokenizer.model")
    assert load_tokenizer(directory)("x  12")["input_ids"] == made["digits"].encode("x  12").ids


def legacy(write, made, kind: str, model_type: str, tokenizer_class: str) -> Path:
    """Write vocab.json, merges.txt and added_tokens.json instead of tokenizer.json."""
    added = {str(i): {"content": token, "special": True} for i, token in enumerate(SPECIALS)}
    directory = write(kind, model_type, tokenizer_class, added_tokens_decoder=added)
    (directory / "tokenizer.json").unlink()
    made[kind].model.save(str(directory))
    return directory


@pytest.mark.parametrize(
    ("kind", "model_type", "tokenizer_class"),
    [
        ("qwen", "qwen2", "Qwen2Tokenizer"),
        ("gpt2", "llama", "GPT2Tokenizer"),
        ("gpt2", "qwen2", "GPT2Tokenizer"),  # AutoTokenizer takes Qwen2Tokenizer
    ],
)
def test_older_files_are_read_by_the_class_that_they_name(write, made, kind, model_type, tokenizer_class):
    directory = legacy(write, made, kind, model_type, tokenizer_class)
    tokenizer = load_tokenizer(directory)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == made[kind].encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == made[kind].decode(ids, skip_special_tokens=False)


def test_a_sentencepiece_model_under_another_model_type_is_read_by_the_class_that_it_names(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    shutil.copy(SENTENCEPIECE_MODEL, tmp_path / "tokenizer.model")
    library = SentencePieceProcessor(model_file=str(SENTENCEPIECE_MODEL))
    tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS[:4]:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == library.encode(text)
        assert tokenizer.decode(library.encode(text)) == library.decode(library.encode(text))


def test_older_files_that_no_class_reads_are_refused(write, made):
    with pytest.raises(UserError, match=r"read as LlamaTokenizer, its tokenizer turns .* into .*add the model's tokenizer\.json"):
        load_tokenizer(legacy(write, made, "gpt2", "llama", "LlamaTokenizer"))
    with pytest.raises(UserError, match="transformers has no tokenizer class NoSuchTokenizer"):
        load_tokenizer(legacy(write, made, "gpt2", "llama", "NoSuchTokenizer"))


def test_a_config_that_changes_the_files_tokens_is_refused_with_the_first_text_that_differs(write):
    with pytest.raises(UserError, match=r"tokenizer_config\.json changes it: .* becomes .* instead of .*split_special_tokens"):
        load_tokenizer(write("digits", "llama", None, split_special_tokens=True))


def test_special_tokens_that_transformers_cannot_read_are_refused_by_name(write):
    with pytest.raises(UserError, match="Special token bos_token has to be either str or AddedToken"):
        load_tokenizer(write("digits", "llama", None, bos_token={"content": BOS}))


@pytest.mark.parametrize(("kind", "model_type", "tokenizer_class"), LAYOUTS)
def test_autotokenizer_reads_the_same_tokens_from_an_export_or_the_run_warns(write, tmp_path, kind, model_type, tokenizer_class):
    directory = write(kind, model_type, tokenizer_class)
    files, warning = tokenizer_files(directory, load_tokenizer(directory), "")
    export = tmp_path / "export"
    shutil.copytree(directory, export)
    for name, text in files.items():
        (export / name).write_text(text, encoding="utf-8")
    trained_on, auto = load_tokenizer(directory), AutoTokenizer.from_pretrained(export)
    same = all(auto(text)["input_ids"] == trained_on(text)["input_ids"] for text in TEXTS)
    assert same or warning
    if warning:  # AutoTokenizer takes Qwen2Tokenizer for these model types, whatever the files name
        assert model_type.startswith("qwen") and "PreTrainedTokenizerFast.from_pretrained" in warning
    ours = load_tokenizer(export)
    assert all(ours(text)["input_ids"] == trained_on(text)["input_ids"] for text in TEXTS)


def test_an_export_of_a_sentencepiece_model_has_a_tokenizer_json_that_splits_as_training_did(tmp_path):
    """AutoTokenizer orders the merges of tokenizer.model by piece id."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    shutil.copy(SENTENCEPIECE_MODEL, tmp_path / "tokenizer.model")
    files, warning = tokenizer_files(tmp_path, load_tokenizer(tmp_path), "")
    assert not warning
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    library = SentencePieceProcessor(model_file=str(SENTENCEPIECE_MODEL))
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert [auto(text, add_special_tokens=False)["input_ids"] for text in TEXTS[:4]] == [library.encode(text) for text in TEXTS[:4]]
