"""Prompts as token ids: special tokens around a text, chat templates of a recipe, tokens that the model lacks."""

import json

import pytest
from tokenizers import processors

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.encoder import PromptEncoder
from megatron_aspo.data.store import PromptStore
from megatron_aspo.tasks.dataset import Loader
from megatron_aspo.tasks.options import DataOptions
from tests.tokenizers import SPECIALS, byte_tokenizer

BOS, EOS = SPECIALS.index("<s>"), SPECIALS.index("</s>")
USER = [{"role": "user", "content": "hi"}]


def framing_tokenizer(single="<s> $A </s>"):
    """Return a tokenizer that adds special tokens around a text, as `add_bos_token` and `add_eos_token` do."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} $B", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return tokenizer


def encoder(tokenizer=None, vocab=None, **options):
    tokenizer = tokenizer or byte_tokenizer()
    return PromptEncoder(tokenizer, vocab or len(tokenizer), DataOptions(**options))


def decoded(ids):
    return byte_tokenizer().decode(ids)


@pytest.fixture
def template(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "chat.jinja").write_text(text)
        return str(tmp_path / "chat.jinja")

    return write


def test_nothing_is_appended_to_a_text():
    assert decoded(encoder(framing_tokenizer()).text("hi")) == "<s>hi"
    assert decoded(encoder(framing_tokenizer("$A </s>")).text("hi")) == "hi"
    assert decoded(encoder().text("hi")) == "hi"


def test_a_text_with_its_beginning_token_gets_no_second_one_and_this_is_reported():
    encode = encoder(framing_tokenizer())
    assert decoded(encode.text("<s><user>hi</s>")) == "<s><user>hi</s>"
    assert decoded(encode.text("<user>hi</s>")) == "<s><user>hi</s>"
    assert encode.remark == "plain-text prompts: <s> is put first, except before 1 of 2 that begin with it already"
    encode = encoder()
    encode.text("hi")
    assert encode.remark == "plain-text prompts: no token is put first"


@pytest.mark.parametrize(("single", "stated", "puts"), [("$A", True, "no token"), ("<s> $A", False, "<s>")])
def test_a_beginning_token_that_contradicts_the_config_is_reported(tmp_path, single, stated, puts):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": stated}))
    tokenizer = framing_tokenizer(single)
    tokenizer.name_or_path = str(tmp_path)
    encode = encoder(tokenizer)
    encode.chat(USER)
    assert encode.remark == ""
    encode.text("hi")
    assert encode.remark == (
        f"plain-text prompts: {puts} is put first; so says tokenizer.json, which wins over add_bos_token={str(stated).lower()} in "
        "tokenizer_config.json"
    )


def load(path, encoder):
    return Loader(PromptStore(), DataOptions(max_prompt_tokens=100), encoder).load("train", [str(path)])


def test_a_token_beyond_the_models_rows_is_refused_with_file_line_token_and_id(tmp_path):
    tokenizer = byte_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<tool>"])
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "fine", "answer": 1}\n{"prompt": "a <tool> b", "answer": 1}\n')
    with pytest.raises(UserError, match=rf"data\.jsonl:2: token '<tool>' has id {rows}, but the model has {rows} rows") as caught:
        load(path, encoder(tokenizer, rows))
    assert "resize the model's embeddings, or use its own tokenizer" in str(caught.value)
    path.write_text('{"prompt": [{"role": "user", "content": "<tool>"}], "answer": 1}\n')
    with pytest.raises(UserError, match=r"data\.jsonl:1: token '<tool>'"):
        load(path, encoder(tokenizer, rows))
    # Rows that pad the model's vocabulary beyond its tokenizer are normal.
    (part,) = load(path, encoder(tokenizer, rows + 64))
    assert part.stop == 1


def test_an_end_token_that_the_model_cannot_produce_is_refused():
    tokenizer = byte_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(UserError, match=rf"token '<end>' has id {rows}, but the model has {rows} rows"):
        encoder(tokenizer, rows)


def test_a_system_prompt_is_prepended_to_chats_without_one():
    encode = encoder(system_prompt="be kind")
    assert decoded(encode.chat(USER)) == "<system>be kind</s><user>hi</s><assistant>"
    own = [{"role": "system", "content": "be brief"}, *USER]
    assert decoded(encode.chat(own)) == "<system>be brief</s><user>hi</s><assistant>"
    encode.check_options_used()
    unused = encoder(system_prompt="be kind")
    unused.chat(own)
    with pytest.raises(UserError, match=r"data\.system_prompt has no effect: each prompt has a system message"):
        unused.check_options_used()


def test_a_recipes_chat_template_replaces_that_of_the_tokenizer(template):
    path = template("{% for m in messages %}[{{ m.content }}]{% endfor %}{{ '<assistant>' if not think }}")
    assert decoded(encoder(chat_template=path).chat(USER)) == "[hi]<assistant>"
    assert decoded(encoder(byte_tokenizer(template=None), chat_template=path).chat(USER)) == "[hi]<assistant>"
    assert decoded(encoder(chat_template=path, chat_template_kwargs={"think": True}).chat(USER)) == "[hi]"


def test_template_options_that_cannot_work_are_refused(template, tmp_path):
    with pytest.raises(UserError, match=r"data\.chat_template_kwargs\.enable_thinking: the chat template .* does not read it"):
        encoder(chat_template_kwargs={"enable_thinking": False}).chat(USER)
    with pytest.raises(UserError, match=r"data\.chat_template_kwargs\.messages is set for each prompt by itself"):
        encoder(chat_template_kwargs={"messages": []})
    with pytest.raises(UserError, match=r"data\.chat_template=.*nowhere\.jinja cannot be read .*No such file"):
        encoder(chat_template=str(tmp_path / "nowhere.jinja")).chat(USER)
    for option in ({"chat_template": template("x")}, {"chat_template_kwargs": {"a": 1}}, {"system_prompt": "be"}):
        encode = encoder(**option)
        encode.text("hi")
        with pytest.raises(UserError, match=rf"data\.{next(iter(option))} has no effect: all prompts are plain strings"):
            encode.check_options_used()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for m in messages %}{{ m.content }}", r"line 1: TemplateSyntaxError: Unexpected end of template"),
        ("\n{{ messages + 1 }}", "TypeError: can only concatenate list"),
        ("{{ messages[0].content.nothing.more }}", "UndefinedError"),
        ("{{ raise_exception('not so') }}", r"TemplateError: not so"),
    ],
)
def test_a_template_that_fails_is_named_in_one_line(template, text, message):
    with pytest.raises(UserError, match=rf"the chat template .*chat\.jinja fails on messages with roles user \(.*{message}") as caught:
        encoder(chat_template=template(text)).chat(USER)
    assert "\n" not in str(caught.value)


def test_named_templates_without_a_default_are_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"rag": "a", "tool_use": "b"}
    with pytest.raises(UserError, match=r"has chat templates named rag, tool_use, and none named default; set data\.chat_template"):
        encoder(tokenizer).chat(USER)
    tokenizer.chat_template = {"rag": "a", "default": "<user>"}
    assert decoded(encoder(tokenizer).chat(USER)) == "<user>"
