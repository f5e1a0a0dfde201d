"""Small tokenizers made on the spot, with the special tokens and chat templates of well-known families."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}{{ m['content'] | trim }}{{ '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = """{{ bos_token }}
{%- for m in messages %}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant') }}
    {%- endif %}
    {%- if m['role'] == 'user' %}
        {{- '[INST] ' + m['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + m['content'] + eos_token }}
    {%- endif %}
{%- endfor %}"""

SPECIAL = {
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    "chatml": ("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
    "mistral": ("<s>", "</s>", "<unk>"),
}
TEMPLATES = {"llama3": LLAMA3, "chatml": CHATML, "mistral": MISTRAL}

TEXT = [
    "What is the capital of France? Paris is. Hello there, how are you today? user assistant system [INST] [/INST]"
] * 3


def write_tokenizer(folder: Path, family: str, *, template: str | None = "") -> Path:
    """A directory with tokenizer.json and tokenizer_config.json; the family's own template unless one is given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(_sentencepiece() if family == "mistral" else _byte_level(family))
    bos, eos, *_ = SPECIAL[family]
    config = {"bos_token": None if family == "chatml" else bos, "eos_token": {"content": eos, "__type": "AddedToken"}}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if template is not None:
        config["chat_template"] = template or TEMPLATES[family]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@cache
def _byte_level(family: str) -> str:
    """A vocabulary of bytes and some merges; Llama 3's begins texts with bos, ChatML's does not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL[family]),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if family == "llama3":
        bos = SPECIAL[family][0]
        tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    return tokenizer.to_str()


@cache
def _sentencepiece() -> str:
    """Words that begin with a low line, bytes for what is unknown: as SentencePiece vocabularies are converted."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trained.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    pieces = [*SPECIAL["mistral"], *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    model = models.BPE(
        vocab={piece: id for id, piece in enumerate(pieces)},
        merges=[tuple(merge) for merge in learned["merges"]],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL["mistral"]])
    return tokenizer.to_str()
