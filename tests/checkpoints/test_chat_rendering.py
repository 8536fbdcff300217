"""Chat templates: the text and ids of transformers, limits for harmful templates, and what the assistant wrote."""

import pytest
from chat_templates import BRACKETS, CHATML, LONG, SHORT, TAGGED, TEMPLATES, byte_tokenizer

from tinycompress.checkpoints import chat_rendering
from tinycompress.checkpoints.chat_answers import encode_conversations
from tinycompress.checkpoints.chat_rendering import ChatTemplate
from tinycompress.errors import InputError

CONVERSATIONS = [SHORT, LONG, LONG[1:], LONG[:2], LONG[:-1]]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """transformers' tokenizer for the same files."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
def test_text_and_ids_are_those_of_transformers(name, prompt, theirs):
    template = ChatTemplate.of(byte_tokenizer(TEMPLATES[name]))
    options = {"chat_template": TEMPLATES[name], "add_generation_prompt": prompt}
    for messages, made in zip(CONVERSATIONS, template.render(CONVERSATIONS, prompt)):
        assert made.text == theirs.apply_chat_template(messages, tokenize=False, **options)
        assert template.tokenizer.encode(made.text) == theirs.apply_chat_template(messages, **options)


def test_variables_reach_the_template():
    template = ChatTemplate(
        byte_tokenizer(), "{{ bos_token }}{{ tools is none }}{{ thinking }}{{ pad_token is defined }}"
    )
    assert template.text(SHORT, thinking=False) == "<s>TrueFalseFalse"
    assert template.ids(SHORT, thinking=1)[0] == 0


def test_smollm2_is_written_as_transformers_does(smollm2, tmp_path):
    transformers = pytest.importorskip("transformers")
    smollm2.tokenizer.save(tmp_path)
    of_transformers = transformers.AutoTokenizer.from_pretrained(tmp_path)
    template = ChatTemplate.of(smollm2.tokenizer)
    for messages in CONVERSATIONS:
        for prompt in (False, True):
            ids = of_transformers.apply_chat_template(messages, add_generation_prompt=prompt)
            assert template.ids(messages, prompt) == ids


def test_named_templates():
    named = {"default": "a", "rag": "b"}
    assert ChatTemplate.of(byte_tokenizer(named)).text(SHORT) == "a"
    assert ChatTemplate.of(byte_tokenizer(named), "rag").text(SHORT) == "b"
    with pytest.raises(InputError, match=r"found 'tool_use'; accepted: default . rag"):
        ChatTemplate.of(byte_tokenizer(named), "tool_use")
    with pytest.raises(InputError, match=r"found none in this model; accepted: .*chat_template\.jinja"):
        ChatTemplate.of(byte_tokenizer(None))


HOSTILE = {
    "no end": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "no end after 1 s"),
    "a large number": ("{{ 10 ** (10 ** 10) }}", "no end after 1 s"),
    "memory": ("{{ 'a' * 10 ** 11 }}", "MemoryError"),
    "a long text": ("{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "more than 4,194,304 characters"),
    "depth": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "inner objects": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "changed messages": ("{{ messages.append(1) }}", "unsafe"),
    "not Jinja": ("{% if %}", "TemplateSyntaxError"),
    "its own error": ("{{ raise_exception('no!') }}", "no!"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_means_harm_is_refused(name, monkeypatch):
    monkeypatch.setattr(chat_rendering, "SECONDS", 1)
    source, message = HOSTILE[name]
    with pytest.raises(InputError, match=message):
        ChatTemplate(byte_tokenizer(), source).text(SHORT)


@pytest.mark.parametrize("messages", ["Hi", [], [3], [{"content": "Hi"}], [{"role": "user", "content": {1}}]])
def test_what_is_no_conversation_is_refused(messages):
    with pytest.raises(InputError, match="messages"):
        ChatTemplate.of(byte_tokenizer()).text(messages)


def answers(template: str, messages) -> str:
    """What counts as the assistant's, between bars."""
    tokenizer = byte_tokenizer(template)
    ((ids, counted),) = encode_conversations(ChatTemplate.of(tokenizer), [messages], ["a test"], answers=True)
    text, inside = "", False
    for token, counts in zip(ids, counted):
        text += "¦" if counts != inside else ""
        text += tokenizer.backend.id_to_token(token)
        inside = counts
    return text + ("¦" if inside else "")


def test_answers_are_told_from_the_rest():
    """Also where an answer says what the template says around it."""
    assert "assistantĊ¦assistant:Ġyes?<|im_end|>¦ĊĊ<|im_start|>userĊassistant<|im_end|>" in answers(CHATML, LONG)
    assert answers(CHATML, LONG).endswith("<|im_start|>assistantĊ¦a<|im_end|>¦ĊĊ")
    assert answers(BRACKETS, LONG).endswith("[INST]ĠassistantĠ[/INST]Ġ¦aĠ</s>¦")
    assert "¦" not in answers(CHATML, SHORT)


def test_the_templates_own_tags_are_those_of_transformers(theirs):
    made = theirs.apply_chat_template(
        LONG, chat_template=TAGGED, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    template = ChatTemplate.of(byte_tokenizer(TAGGED))
    ((ids, counted),) = encode_conversations(template, [LONG], ["a test"], answers=True)
    assert ids == made["input_ids"] and list(map(int, counted)) == made["assistant_masks"] and any(counted)


def test_answers_that_cannot_be_told_apart_are_refused():
    with pytest.raises(InputError, match=r"the answers in a test: .*generation"):
        answers("{% for m in messages %}{{ m.content | upper }}{% endfor %}", LONG)
