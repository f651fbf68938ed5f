"""Chat templates of the agents' session (agents.py), in our own words."""

#: A line for each message, and thinking that goes when the user speaks again.
TEMPLATE = """\
{%- for t in tools or [] %}{{ t | tojson }}
{% endfor %}
{%- set spoken = namespace(at=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set spoken.at = loop.index0 %}
{%- endif %}{% endfor %}
{%- for m in messages %}<{{ m.role }}>
{%- if m.reasoning and loop.index0 > spoken.at %}(thinking: {{ m.reasoning }})
{%- endif %}
{{- m.content }}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""

#: As Qwen3's is shaped: tools behind the system prompt, calls as JSON in tags, results
#: in turns of the user's, thinking only behind what the user said last.
IN_TAGS = """\
{%- set spoken = namespace(at=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set spoken.at = loop.index0 %}
{%- endif %}{% endfor %}
{%- set first = messages[0].content if messages[0].role == 'system' else '' %}
{%- if first or tools %}[turn]system
{{ first }}
{%- if tools %}

# What you may call
<tools>{% for t in tools %}
{{ t | tojson }}{% endfor %}
</tools>
A call is an object with name and arguments between <tool_call> and </tool_call>.
{%- endif %}[end]
{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}[turn]{{ m.role }}
{{ m.content }}[end]
{% elif m.role == 'assistant' %}[turn]assistant
{% if m.reasoning_content and loop.index0 > spoken.at %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}
{{- m.content }}
{%- for call in m.tool_calls or [] %}
<tool_call>
{% set function = call.function -%}
{"name": "{{ function.name }}", "arguments": {{ function.arguments | tojson }}}
</tool_call>
{%- endfor %}[end]
{% elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}[turn]user{% endif %}
<tool_response>
{{ m.content }}
</tool_response>
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}[end]
{% endif %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}[turn]assistant
{% endif %}"""

#: As gpt-oss's is shaped: a header with the date, the developer's words and tools as
#: declarations, every message on a channel, and no analysis of turns that are over.
IN_CHANNELS = """\
{%- macro said(who, channel, text, end) %}[start]{{ who }}
{%- if channel %}[channel]{{ channel }}{% endif %}[message]{{ text }}[{{ end }}]
{%- endmacro %}
{%- set spoken = namespace(at=-1, called='') %}
{%- for m in messages %}{% if m.role == 'user' %}{% set spoken.at = loop.index0 %}
{%- endif %}{% endfor %}
{%- set about = 'You answer in channels: analysis, commentary, final.\nToday: '
   ~ strftime_now('%Y-%m-%d') ~ '\nReasoning: medium' %}
{{- said('system', '', about, 'end') }}
{%- if messages[0].role == 'system' or tools %}[start]developer[message]# Instructions

{{ messages[0].content if messages[0].role == 'system' else '' }}
{%- if tools %}

# Tools

namespace functions {
{% for t in tools %}// {{ t.function.description }}
type {{ t.function.name }} = (_: {
{%- for name in t.function.parameters.properties %}
{{ name }}: string,
{%- endfor %}
}) => any;
{% endfor %}}
{%- endif %}[end]
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ said('user', '', m.content, 'end') }}
{%- elif m.role == 'assistant' %}
{%- if m.reasoning_content and loop.index0 > spoken.at %}
{{- said('assistant', 'analysis', m.reasoning_content, 'end') }}
{%- endif %}
{%- if m.tool_calls %}
{%- if m.content %}{{ said('assistant', 'commentary', m.content, 'end') }}{% endif %}
{%- for call in m.tool_calls %}{% set spoken.called = call.function.name %}
{{- said('assistant to=functions.' ~ call.function.name, 'commentary json',
   call.function.arguments | tojson, 'call') }}
{%- endfor %}
{%- else %}{{ said('assistant', 'final', m.content, 'end') }}{% endif %}
{%- elif m.role == 'tool' %}
{{- said('functions.' ~ spoken.called ~ ' to=assistant', 'commentary',
   m.content | tojson, 'end') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}[start]assistant{% endif %}"""
