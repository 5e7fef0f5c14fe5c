"""Chat format of the G1 series of RWKV-7.

    System: ...\n\nUser: ...\n\nAssistant:

A blank line ends a turn, so there is none within one. ` <think` behind it lets the model think, an
empty block of thoughts, ` <think>\\n</think`, keeps it from that; the model writes the last `>` of
both itself, maybe in one token with what follows. Without either the model does not think. That is
what the model card of BlinkDL/rwkv7-g1 says (its "think-mode", "fake think" and "no-think-mode"
prompts). Earlier thoughts are not part of the history.
"""

TEMPLATE = r"""
{%- set answer_stops = ["\n\nUser:"] -%}
{%- set thinking_marks = ["<think>", "</think>"] -%}
{%- for message in messages -%}
  {%- set content = message.content -%}
  {%- if message.role == "assistant" -%}
    {%- set content = content.split("</think>")[-1] -%}
  {%- endif -%}
  {{- {"system": "System", "user": "User", "assistant": "Assistant"}[message.role] + ":" -}}
  {%- for line in content.strip().split("\n") if line.strip() -%}
    {{- (" " if loop.first else "\n") + line.rstrip("\r") -}}
  {%- endfor -%}
  {{- "\n\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- "Assistant:" -}}
  {%- if enable_thinking is defined -%}
    {{- " <think" if enable_thinking else " <think>\n</think" -}}
  {%- endif -%}
{%- endif -%}
""".strip()
