"""Small chat templates that behave like those of the families people use, each with a tokenizer of the kind it has.

Not the originals: what matters is what each writes between the question, the answer and the end of the turn.
"""

from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Family:
    """
    template: the chat template.
    control: special tokens; the last one ends a turn.
    sentencepiece: a blank is a letter of the next word ("▁Four"), and stands before a text that begins.
    refused: the template cannot be answered without a thought.
    """

    template: str
    control: tuple[str, ...]
    sentencepiece: bool = False
    refused: bool = False


CHATML = """
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

SMOLLM2 = (
    "{%- if messages[0].role != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM.<|im_end|>\\n' }}{%- endif %}" + CHATML
)

# the last answer is written behind an empty thought, and what stands before a `</think>` in it is taken for a thought
QWEN3_TURNS = """
{%- for m in messages %}
  {%- if m.role == 'assistant' %}
    {%- set content = m.content.split('</think>')[-1].lstrip('\\n') %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
    {{- content + '<|im_end|>\\n' }}
  {%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"""
QWEN3_HYBRID = (
    QWEN3_TURNS
    + """
  {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
)
QWEN3_THINKING = QWEN3_TURNS + "{{- '<think>\\n' }}{%- endif %}"

LLAMA2 = """
{%- for m in messages %}
  {%- if m.role == 'system' %}{%- set system = '<<SYS>>\\n' + m.content + '\\n<</SYS>>\\n\\n' %}
    {%- set ns = namespace(system=system) %}{{- bos_token + '[INST] ' + system }}
  {%- elif m.role == 'user' %}
    {%- if not (loop.index0 == 1 and messages[0].role == 'system') %}{{- bos_token + '[INST] ' }}{%- endif %}
    {{- m.content.strip() + ' [/INST]' }}
  {%- else %}{{- ' ' + m.content.strip() + ' ' + eos_token }}{%- endif %}
{%- endfor %}"""

MISTRAL = """{{- bos_token }}
{%- for m in messages %}
  {%- if m.role == 'assistant' %}{{- ' ' + m.content.strip() + eos_token }}
  {%- else %}{{- '[INST] ' + m.content + ' [/INST]' }}{%- endif %}
{%- endfor %}"""

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
  {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
  {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' + system + '<|eot_id|>' }}
{%- for m in messages %}
  {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

GEMMA = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for m in messages %}
  {%- set role = 'model' if m.role == 'assistant' else m.role %}
  {{- '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

PHI3 = """
{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}"""

GPT_OSS = """{{- '<|start|>system<|message|>Current date: ' + strftime_now("%Y-%m-%d") + '<|end|>' }}
{%- for m in messages %}
  {%- if m.role == 'assistant' %}
    {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}
  {%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

DEEPSEEK_R1 = """{{- bos_token }}
{%- for m in messages %}
  {%- if m.role == 'user' %}{{- '<｜User｜>' + m.content }}{%- elif m.role == 'system' %}{{- m.content }}
  {%- else %}{{- '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{%- endif %}"""

FAMILIES = {
    "smollm2": Family(SMOLLM2, ("<|endoftext|>", "<|im_start|>", "<|im_end|>")),
    "qwen3_instruct": Family(CHATML, ("<|endoftext|>", "<|im_start|>", "<|im_end|>")),
    "qwen3_hybrid": Family(QWEN3_HYBRID, ("<|endoftext|>", "<|im_start|>", "<|im_end|>")),
    "qwen3_thinking": Family(QWEN3_THINKING, ("<|endoftext|>", "<|im_start|>", "<|im_end|>")),
    "llama2": Family(LLAMA2, ("<unk>", "<s>", "</s>"), sentencepiece=True),
    "mistral": Family(MISTRAL, ("<unk>", "<s>", "</s>"), sentencepiece=True),
    "llama3": Family(LLAMA3, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "gemma": Family(GEMMA, ("<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), sentencepiece=True),
    "phi3": Family(PHI3, ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), sentencepiece=True),
    "gpt_oss": Family(GPT_OSS, ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>")),
    "deepseek_r1": Family(
        DEEPSEEK_R1, ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"), refused=True
    ),
}  # fmt: skip


def family_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """A token a byte; in a SentencePiece one also each letter with the blank before it, "▁F"."""
    if family.sentencepiece:
        bytes_ = [f"<0x{number:02X}>" for number in range(256)]
        letters = [chr(number) for number in range(33, 127)]
        words = ["<unk>", *bytes_, "▁", *letters, *(f"▁{letter}" for letter in letters)]
        merges = [("▁", letter) for letter in letters]
        vocabulary = {word: index for index, word in enumerate(words)}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in family.control])
    backend.add_tokens([AddedToken(word, normalized=False) for word in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=family.control[1], eos_token=family.control[-1],
        pad_token=family.control[0], chat_template=family.template, clean_up_tokenization_spaces=False,
    )  # fmt: skip
