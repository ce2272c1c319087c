"""Tokenizers and chat templates."""

import json
import random
import shutil
from pathlib import Path

import mistral_common
import pytest
from sentencepiece import SentencePieceProcessor

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.encoder import PromptEncoder
from megatron_aspo.data.tokenizer import load_tokenizer
from megatron_aspo.tasks.options import DataOptions
from tests.tokenizers import byte_tokenizer, save_byte_tokenizer

USER = {"role": "user", "content": "hi"}
SENTENCEPIECE_MODEL = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"


@pytest.fixture
def model_directory(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def encoder(tokenizer=None, vocab=10**6, **options):
    return PromptEncoder(tokenizer or byte_tokenizer(), vocab, DataOptions(**options))


def test_chat_goes_through_the_template_and_ends_with_the_generation_prompt():
    tokenizer = byte_tokenizer()
    ids = encoder(tokenizer).chat([{"role": "system", "content": "be"}, {"role": "user", "content": "hi é"}])
    assert tokenizer.decode(ids) == "<system>be</s><user>hi é</s><assistant>"
    assert len(ids) == 5 + len("behi é".encode())
    assert isinstance(ids, tuple) and all(type(i) is int for i in ids)


def test_text_does_not_go_through_the_template():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(encoder(tokenizer).text("hi")) == "hi"


def test_no_chat_template_names_the_cure():
    with pytest.raises(UserError, match=r"no chat template.*plain strings"):
        encoder(byte_tokenizer(template=None)).chat([USER])


def test_messages_that_the_template_refuses_are_a_user_error():
    with pytest.raises(UserError, match=r"roles user, system, user .*system must come first"):
        encoder().chat([{"role": role, "content": "x"} for role in ("user", "system", "user")])


def test_a_saved_tokenizer_loads_with_its_template(model_directory):
    save_byte_tokenizer(model_directory)
    tokenizer = load_tokenizer(model_directory)
    assert tokenizer.decode(encoder(tokenizer).chat([{"role": "user", "content": "a  1"}])) == "<user>a  1</s><assistant>"
    assert tokenizer.eos_token == "</s>"


def test_faulty_models_are_user_errors(model_directory, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("owner/no-such-model", "not a name!"):
        with pytest.raises(UserError, match="the Hugging Face hub gave no such model"):
            load_tokenizer(name)
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_tokenizer(model_directory.parent)
    with pytest.raises(UserError, match="there is no such directory"):
        load_tokenizer(model_directory / "missing")
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(model_directory)
    (model_directory / "tokenizer.json").write_text("{broken")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(model_directory)


def test_sentencepiece_splits_as_the_sentencepiece_library_does(model_directory):
    shutil.copy(SENTENCEPIECE_MODEL, model_directory / "tokenizer.model")
    (model_directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    tokenizer = load_tokenizer(model_directory)
    library = SentencePieceProcessor(model_file=str(SENTENCEPIECE_MODEL))
    draw = random.Random(0)
    for _ in range(200):
        text = "x" + "".join(draw.choice("abc  \n\t12.éß日🙂the<>") for _ in range(40))
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == library.encode(text)
    assert tokenizer("a  b", add_special_tokens=False)["input_ids"] != [library.piece_to_id(piece) for piece in ("▁a", "▁▁", "b")]


def test_sentencepiece_that_transformers_misreads_is_refused(model_directory):
    shutil.copy(SENTENCEPIECE_MODEL, model_directory / "tokenizer.model")
    with pytest.raises(UserError, match="set tokenizer_class"):
        load_tokenizer(model_directory)
