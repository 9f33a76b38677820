"""Tokenizers and chat templates like those of public families, made here: nothing is downloaded."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_LINES = [
    "What is the capital of France? The capital of France is Paris.",
    "Answer in one word. 2 + 2 = 4, and 12 * 3 = 36. Hello world, how are you?",
    "First think about it, then answer: the reason is that it rains in the north.",
    "def square(x):\n    return x * x\n\nprint(square(4))",
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (  # the system message goes to the last message, where that is the user's
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{% endif %}{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] "
    "{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}{{ m['content'] }}[/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
QWEN_3 = (  # thoughts are kept in the last turn and dropped from a history
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}"
    "{%- endif %}{%- endfor %}{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{%- set content = m.content %}{%- set thought = m.reasoning_content or '' %}{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last %}{{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' +"
    " content.lstrip('\n') + '<|im_end|>\n' }}{%- else %}{{- '<|im_start|>assistant\n' + content + '<|im_end|>\n' }}"
    "{%- endif %}{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- if enable_thinking is defined and"
    " enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
R1 = (  # the prompt opens the thoughts, and no message keeps them
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}"
    "{% else %}<|Assistant|>{{ m['content'].split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} {% else %}ASSISTANT: {{ m['content'] }}"
    "{% if not loop.last %}{{ eos_token }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
ALPACA = (
    "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def byte_level(special: list[str], template: str | None = None, **named: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE (GPT-2, Llama 3, Qwen). `special` in the order of their ids; `named`: bos_token and so on."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(tokenizer, special, template, named, alphabet)


def sentence_piece(
    special: list[str], template: str | None = None, legacy: bool = False, **named: str
) -> PreTrainedTokenizerFast:
    """BPE with a space in front of every text: as a pre-tokenizer (Mistral), or a normalizer (`legacy`, Llama 2)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    last = [decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), *last])
    special = ["<unk>", *(token for token in special if token != "<unk>")]
    return _trained(
        tokenizer, special, template, {"unk_token": "<unk>", **named}, ["▁", "\n", *map(chr, range(33, 127))]
    )


def ends_every_text(tokenizer: PreTrainedTokenizerFast, front: str | None = None) -> PreTrainedTokenizerFast:
    """The same tokenizer, which puts its end token behind every text, as with add_eos_token."""
    names = [name for name in (front, tokenizer.eos_token) if name]
    single = f"{front} $A {tokenizer.eos_token}" if front else f"$A {tokenizer.eos_token}"
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    return tokenizer


def _trained(
    tokenizer: Tokenizer, special: list[str], template: str | None, named: dict[str, str], alphabet: list[str]
) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_LINES * 4, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    wrapped.chat_template = template
    return wrapped


def family(name: str) -> Any:
    """The tokenizer of a family by its template's name here, with the special tokens as that family has them."""
    match name:
        case "chatml":
            special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
            return byte_level(special, CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")
        case "chatml of a base model":
            return byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], CHATML, eos_token="<|endoftext|>")
        case "llama 3":
            special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
            return byte_level(special, LLAMA_3, bos_token=special[0], eos_token="<|end_of_text|>")
        case "mistral":
            return sentence_piece(["<s>", "</s>", "[INST]", "[/INST]"], MISTRAL, bos_token="<s>", eos_token="</s>")
        case "llama 2":
            return sentence_piece(["<s>", "</s>"], LLAMA_2, legacy=True, bos_token="<s>", eos_token="</s>")
        case "gemma":
            special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
            named = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
            return sentence_piece(special, GEMMA, **named)
        case "qwen 3":
            special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
            return byte_level(special, QWEN_3, eos_token="<|im_end|>", pad_token="<|endoftext|>")
        case "r1":
            special = ["<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>", "<think>", "</think>"]
            return byte_level(special, R1, bos_token="<|begin|>", eos_token="<|end|>")
        case "phi 3":
            special = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
            return byte_level(special, PHI_3, eos_token="<|endoftext|>")
        case "vicuna":
            return sentence_piece(["<s>", "</s>"], VICUNA, legacy=True, bos_token="<s>", eos_token="</s>")
        case "alpaca":
            return byte_level(["<|endoftext|>"], ALPACA, eos_token="<|endoftext|>")
        case "glm":
            special = ["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"]
            return byte_level(special, GLM, eos_token="<|endoftext|>")
    raise ValueError(f"no family {name!r}")


CLOSES = {
    "chatml": "<|im_end|>",
    "chatml of a base model": "<|im_end|>",
    "llama 3": "<|eot_id|>",
    "mistral": "</s>",
    "llama 2": "</s>",
    "gemma": "<end_of_turn>",
    "qwen 3": "<|im_end|>",
    "r1": "<|end|>",
    "phi 3": "<|end|>",
    "vicuna": "</s>",
    "alpaca": None,
    "glm": None,
}
"""With which token a family's template closes an assistant's turn."""
