"""Chat templates: the same text as transformers renders, within bounds, and refusals in words."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tokenizers import Tokenizer as HFTokenizer
from transformers import PreTrainedTokenizerFast

from nsa_serve.config import ModelSource
from nsa_serve.errors import CheckpointError, TemplateError
from nsa_serve.models.checkpoint import resolve
from nsa_serve.tokenizer import ChatTemplate, Tokenizer, chat_template, read_source

SPECIAL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Hi <b>there</b> & 'you'\n"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "你好 👋"},
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
    }
]
TEMPLATES = {
    "inst": (
        "{{ bos_token }}{%- for m in messages %}\n"
        "  {%- if m.role == 'user' %}{{ '[INST] ' + m.content | trim + ' [/INST]' }}\n"
        "  {%- elif m.role == 'assistant' %}{{ ' ' + m['content'] + eos_token }}\n"
        "  {%- endif %}\n"
        "{%- endfor %}"
    ),
    "headers": (
        "{% set ns = namespace(found=false, n=0) %}\n"
        "{% for m in messages %}\n"
        "    {% if m.role == 'system' %}{% set ns.found = true %}{% continue %}{% endif %}\n"
        "    {% set ns.n = ns.n + 1 %}\n"
        "<|{{ m.role }}|>{{ loop.index0 }}:{{ m.content | upper }}\n"
        "    {% if ns.n == 2 %}{% break %}{% endif %}\n"
        "{% endfor %}\n"
        "{{ ns.found }}{% if add_generation_prompt %}<|assistant|>{% endif %}\n"
    ),
    "tools": (
        "{% macro show(t) %}{{ t | tojson(indent=2) }}|{{ t.function.name }}{% endmacro %}\n"
        "{% if tools %}{% for t in tools %}{{ show(t) }}\n{% endfor %}{% endif %}\n"
        "{{ messages | tojson }}{{ messages[0] is mapping }}{{ missing is defined }}{{ mood }}\n"
        "{% generation %}{{ messages[-1].content.split()[0] }}{% endgeneration %}"
    ),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(read_source(resolve(ModelSource())))


@pytest.fixture(scope="module")
def yardstick(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=HFTokenizer.from_str(tokenizer.source.tokenizer_json),
        bos_token=SPECIAL["bos_token"],
        eos_token=SPECIAL["eos_token"],
    )


def rendered(text: str, messages: Any = TALK, **options: Any) -> str:
    return ChatTemplate({"default": text}, SPECIAL).render(messages, **options)


@pytest.mark.parametrize("prompted", [True, False])
def test_the_embedded_template_renders_as_in_transformers(
    tokenizer: Tokenizer, yardstick: PreTrainedTokenizerFast, prompted: bool
) -> None:
    text = tokenizer.source.chat_templates["default"]
    for messages in (TALK, TALK[1:2]):
        expected = yardstick.apply_chat_template(
            messages, chat_template=text, tokenize=False, add_generation_prompt=prompted
        )
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=prompted) == expected
        ids = tokenizer.encode_chat(messages, add_generation_prompt=prompted)
        assert tokenizer.decode(ids, skip_special=False) == expected


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_common_kinds_of_templates_render_as_in_transformers(
    yardstick: PreTrainedTokenizerFast, name: str, tools: Any
) -> None:
    expected = yardstick.apply_chat_template(
        TALK,
        chat_template=TEMPLATES[name],
        tools=tools,
        tokenize=False,
        add_generation_prompt=True,
        mood="calm",
    )
    assert rendered(TEMPLATES[name], tools=tools, mood="calm") == expected


def test_the_tool_template_is_taken_where_tools_are_given() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "tools"}, {})
    assert template.render(TALK) == "plain"
    assert template.render(TALK, tools=TOOLS) == "tools"


@pytest.mark.parametrize(
    ("templates", "shown"),
    [
        ({"default": "{{ messages }}"}, None),
        ({"default": "{% if tools is not none %}x{% endif %}"}, "default"),
        ({"default": "plain", "tool_use": "{{ tools | tojson }}"}, "tool_use"),
        ({"default": "{% set tools = [] %}{{ tools }}"}, None),
        ({}, None),
    ],
)
def test_the_template_that_shows_tools_is_known(templates, shown) -> None:
    assert ChatTemplate(templates, {}).tool_template == templates.get(shown)


def test_strftime_now_gives_todays_year() -> None:
    assert rendered("{{ strftime_now('%Y') }}").startswith("20")


def test_a_refusal_of_the_template_reaches_the_client_in_its_words() -> None:
    with pytest.raises(TemplateError, match="roles must alternate") as caught:
        rendered("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages[9].content + 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ 1 / 0 }}",
        "{% include 'other' %}",
        "{{ 'a' * 999999999999 }}",
        "{{ [0] * 999999999 }}",
        "{{ 9 ** 999999999 }}",
    ],
)
def test_what_fails_or_is_forbidden_in_a_template_is_a_template_error(text: str) -> None:
    with pytest.raises(TemplateError, match="chat template"):
        rendered(text)


def test_a_template_without_end_is_stopped_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDER_SECONDS", 0.05)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateError, match=r"more than 0\.05 s"):
        rendered(loop)


def test_a_template_that_grows_its_text_is_stopped_by_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDERED_CHARS", 1000)
    with pytest.raises(TemplateError, match="exceeds 1000 characters"):
        rendered("{% for i in range(999) %}0123456789{% endfor %}")


def test_request_variables_can_not_replace_the_templates_own() -> None:
    for name in ("documents", "raise_exception", "__deadline__"):
        with pytest.raises(TemplateError, match=name):
            rendered("x", **{name: 1})


def test_a_model_without_template_says_what_to_do() -> None:
    with pytest.raises(TemplateError, match="--chat-template"):
        ChatTemplate({}, {}).render(TALK)


def test_a_template_that_is_no_jinja_is_refused_at_load() -> None:
    with pytest.raises(CheckpointError, match="chat template 'default'"):
        ChatTemplate({"default": "{% for %}"}, {})


def test_templates_render_from_many_threads(tokenizer: Tokenizer) -> None:
    talks = [[{"role": "user", "content": f"number {i}"}] for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(tokenizer.apply_chat_template, talks))
    assert all(f"number {i}<|im_end|>" in text for i, text in enumerate(texts))
