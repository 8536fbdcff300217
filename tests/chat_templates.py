"""Chat templates of the forms that models have, and a tokenizer for them."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tinycompress.checkpoints.tokenizer import Tokenizer

CHATML = """\
{% for message in messages %}
  {% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
  {% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
BRACKETS = """\
{%- if messages[0]['role'] == 'system' -%}
  {%- set system = '<<' + messages[0]['content'] + '>>' -%}{%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('roles must alternate') -}}
  {%- endif -%}
  {%- if message['role'] == 'user' -%}
    {{- bos_token + '[INST] ' + (system | default('') if loop.first else '') + message['content'].strip() -}}
    {{- ' [/INST]' -}}
  {%- else -%}
    {{- ' ' + message['content'] | trim + ' ' + eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""
TAGGED = """\
{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}
<|im_start|>{{ m.role }}{{ {'é': '<b>'} | tojson }}{{ strftime_now('%Y') }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}
{% else %}{{ m.content }}<|im_end|>{% endif %}

{% endfor %}"""
TEMPLATES = {"chatml": CHATML, "brackets": BRACKETS, "tagged": TAGGED}
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
SHORT = [{"role": "user", "content": "Hi"}]
LONG = [
    {"role": "system", "content": "Be <kind> & brief."},
    {"role": "user", "content": "Héllo \n there "},
    {"role": "assistant", "content": "assistant: yes?"},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "a"},
]


def byte_tokenizer(template: str | dict[str, str] | None = CHATML) -> Tokenizer:
    """A token for each byte, and four special ones before them; 260 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*SPECIALS, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(backend, config | ({} if template is None else {"chat_template": template}))
