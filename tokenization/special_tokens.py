"""The eight special tokens and their frozen ids: every tokenizer and every checkpoint depends on them."""

SPECIAL_TOKENS = (
    "<|pad|>",  # 0
    "<|bos|>",  # 1
    "<|eos|>",  # 2
    "<|unk|>",  # 3
    "<|system|>",  # 4
    "<|user|>",  # 5
    "<|assistant|>",  # 6
    "<|end|>",  # 7
)

# One turn is the token of its role, its text and <|end|>. There is no newline between turns: the special tokens are
# separators enough, and a small model should not spend its context on them.
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('The role of a message must be system, user or assistant, got ' + message['role'] + '.') -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message['content'] + '<|end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
