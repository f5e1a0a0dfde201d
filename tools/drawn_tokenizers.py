"""Tokenizer directories drawn from a seed: every way in which files, flags, classes and templates come together.

`differences` compares zoo with transformers' own public calls on one of them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer as Backend, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel, Sequence as Processors, TemplateProcessing

from tools.made_tokenizer import LLAMA3
from zoo.core.errors import DataError
from zoo.core.tokenizer.tokenizer import Tokenizer

BOS, EOS, UNK, PAD, SEP = "<s>", "</s>", "<unk>", "<pad>", "<|sep|>"
START, END = "<|im_start|>", "<|im_end|>"
HEADS = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|endoftext|>")
BEYOND = "<|tool|>"
CORPUS = ["The capital of France is Paris. user assistant system [INST] def f(x): return x + 1\n  two  spaces 1234"] * 3

AXES: dict[str, tuple[Any, ...]] = {
    "vocabulary": ("byte", "byte", "prepend", "metaspace", "unigram"),
    "post": (None, "bos", "bos", "bos and eos", "byte level", "byte level and bos", "sep"),
    "class": (
        None,
        "PreTrainedTokenizerFast",
        "PreTrainedTokenizerFast",
        "LlamaTokenizerFast",
        "LlamaTokenizer",
        "Qwen2TokenizerFast",
        "GPT2TokenizerFast",
        "GemmaTokenizerFast",
        "FooTokenizer",
    ),
    "model": (None, None, "llama", "mixtral", "nemotron", "qwen2", "mistral", "strange"),
    "names": ("text", "objects", "map", "none", "ids", "misspelt"),
    "decoder": (False, True, "beyond"),
    "added_tokens.json": (False, False, True),
    "extra": (None, "listed", "new", "named"),
    "add_bos_token": (None, None, True, False),
    "add_eos_token": (None, None, None, True, False),
    "flagged": (True, False),
    "cut": (False, False, True),
    "split_special_tokens": (None, None, None, None, True),
    "template": ("chatml", "llama3", "tokens", "tools", "day", "generation"),
    "place": ("text", "list", "dict", "file", "file over text", "additional", "none"),
}
"""What is drawn, and how often."""

TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama3": LLAMA3,
    "tokens": "{{ bos_token }}{% for m in messages %}{{ sep_token }}{{ m.role }}: {{ m.content }}{{ eos_token }}"
    "{{ unk_token is defined }}{% if pad_token %}{{ pad_token }}{% endif %}\n{% endfor %}{{ cls_token }}",
    "tools": "{% if tools is not none %}{{ tools | tojson(indent=2) }}{% else %}none{% endif %}"
    "{% if documents %}{{ documents[0].title }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.content | trim }}<|im_end|>\n{% endfor %}{{ style | default('-') }}",
    "day": "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}"
    "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
    "generation": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}",
}

TEXTS = (
    "",
    "a",
    "Hello there",
    " leading and trailing ",
    "two  spaces\tand\ttabs",
    "line\nbreaks\n\n\nmany\r\n",
    "Paris is the capital of France.",
    "caf\u00e9 na\u00efve \u00fc",
    "\u65e5\u672c\u8a9e \u4e2d\u6587 \ud55c\uad6d\uc5b4",
    "\U0001f600\U0001f468\u200d\U0001f469",
    "1234567 3.14 1e-5",
    "def f(x):\n    return x + 1\n",
    "[INST] not a token [/INST]",
    "<not a token> <|nor this|>",
    "\u2581low line",
    "e\u0301 decomposed",
    "x" * 60,
    "\u00a0no-break\u3000wide",
    "user assistant system",
    "end.",
)


@dataclass(frozen=True)
class Drawn:
    """A directory, what was drawn for it, and every token that a file gives an id."""

    path: Path
    choices: dict[str, Any]
    defined: set[str] = field(repr=False)


def draw(seed: int, folder: Path) -> Drawn:
    """Write the directory of a seed."""
    rng = random.Random(seed)
    choices = {axis: rng.choice(values) for axis, values in AXES.items()}
    return write(folder, **choices)


def write(folder: Path, **choices: Any) -> Drawn:
    """Write a directory; what is not chosen is the first of its axis."""
    choices = {axis: choices.get(axis, values[0]) for axis, values in AXES.items()}
    folder.mkdir(parents=True, exist_ok=True)
    backend = Backend.from_str(_vocabulary(choices["vocabulary"], choices["flagged"], choices["post"]))
    if choices["cut"]:
        backend.enable_truncation(4)
        backend.enable_padding(length=8, pad_token=PAD, pad_id=backend.token_to_id(PAD))
    backend.save(str(folder / "tokenizer.json"))
    files = _files(choices, backend)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    beyond = {BEYOND} if choices["decoder"] == "beyond" or choices["added_tokens.json"] else set()
    return Drawn(folder, choices, set(backend.get_vocab()) | beyond)


def _files(choices: dict[str, Any], backend: Backend) -> dict[str, Any]:
    config: dict[str, Any] = {}
    files: dict[str, Any] = {"tokenizer_config.json": config}
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "sep_token": SEP}
    match choices["names"]:
        case "text":
            config.update(names)
        case "objects":
            config.update({name: {"__type": "AddedToken", "content": text} for name, text in names.items()})
        case "map":
            files["special_tokens_map.json"] = {name: {"content": text} for name, text in names.items()}
        case "misspelt":
            config.update({**names, "eos_token": "<|end of txt|>"})
    if choices["class"]:
        config["tokenizer_class"] = choices["class"]
    for flag in ("add_bos_token", "add_eos_token", "split_special_tokens"):
        if choices[flag] is not None:
            config[flag] = choices[flag]
    next_id = backend.get_vocab_size()
    if choices["decoder"]:
        tokens = dict(backend.get_added_tokens_decoder())
        if choices["decoder"] == "beyond":
            tokens[next_id] = AddedToken(BEYOND, special=True, normalized=False)
        flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        config["added_tokens_decoder"] = {id: {flag: getattr(t, flag) for flag in flags} for id, t in tokens.items()}
    if choices["added_tokens.json"]:
        files["added_tokens.json"] = {BEYOND: next_id}
    match choices["extra"]:
        case "listed":
            config["additional_special_tokens"] = [START, END]
        case "new":
            config["additional_special_tokens"] = [START, "<|new|>"]
        case "named":
            config["extra_special_tokens"] = {"turn_token": END}
    if choices["model"] == "strange":
        files["config.json"] = {"model_type": "strange", "auto_map": {"AutoConfig": "configuration_strange.Strange"}}
    elif choices["model"]:
        ids = {"bos_token_id": backend.token_to_id(BOS), "eos_token_id": backend.token_to_id(EOS)}
        files["config.json"] = {"model_type": choices["model"], **ids}
    _place(choices, config, files)
    return files


def _place(choices: dict[str, Any], config: dict[str, Any], files: dict[str, Any]) -> None:
    template = TEMPLATES[choices["template"]]
    named = {"default": template, "tool_use": "with {{ tools | length }} " + template}
    match choices["place"]:
        case "text":
            config["chat_template"] = template
        case "list":
            config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
        case "dict":
            config["chat_template"] = named
        case "file":
            files["chat_template.jinja"] = template
        case "file over text":
            config["chat_template"] = "not this"
            files["chat_template.jinja"] = template
        case "additional":
            files["chat_template.jinja"] = template
            files["additional_chat_templates/tool_use.jinja"] = named["tool_use"]


# Vocabularies -------------------------------------------------------------------------------------


@cache
def _vocabulary(kind: str, flagged: bool, post: str | None) -> str:
    backend = {"byte": _byte_level, "prepend": _prepend, "metaspace": _metaspace, "unigram": _unigram}[kind]()
    special = [AddedToken(text, special=True, normalized=False) for text in (UNK, BOS, EOS, PAD, SEP, *HEADS)]
    backend.add_special_tokens(special)
    turns = [AddedToken(text, special=flagged, normalized=False) for text in (START, END)]
    (backend.add_special_tokens if flagged else backend.add_tokens)(turns)
    backend.add_tokens([AddedToken("  ", normalized=False), AddedToken("assistant", normalized=False)])
    ids = [(text, backend.token_to_id(text)) for text in (BOS, EOS, SEP)]
    templates = {
        "bos": TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=ids),
        "bos and eos": TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=ids),
        "byte level": ByteLevel(trim_offsets=False),
        "byte level and bos": Processors(
            [ByteLevel(trim_offsets=True), TemplateProcessing(single=f"{BOS} $A", special_tokens=ids)]
        ),
        "sep": TemplateProcessing(single=f"{SEP} $A", special_tokens=ids),
    }
    if post:
        backend.post_processor = templates[post]
    return str(backend.to_str())


def _byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return backend


def _pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Words that begin with a low line, and bytes for what is unknown: as SentencePiece's are converted."""
    learner = Backend(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    pieces = [UNK, BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    return {piece: id for id, piece in enumerate(pieces)}, [tuple(merge) for merge in learned["merges"]]


def _prepend() -> Backend:
    vocabulary, merges = _pieces()
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token=UNK, byte_fallback=True, fuse_unk=True)
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def _metaspace() -> Backend:
    backend = _prepend()
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return backend


def _unigram() -> Backend:
    vocabulary, _ = _pieces()
    backend = Backend(models.Unigram([(piece, -float(id)) for piece, id in vocabulary.items()], 0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


# Comparing ----------------------------------------------------------------------------------------


def differences(drawn: Drawn, theirs: Callable[[], Any]) -> Iterator[str]:
    """Compare zoo with transformers on a directory. `theirs` loads it by AutoTokenizer, and may raise."""
    try:
        their = theirs()
    except Exception as error:
        their = error
    try:
        ours = Tokenizer.from_directory(drawn.path)
    except DataError as error:
        reason = _reason_to_refuse(drawn, their)
        if "\n" in str(error) or not reason:
            yield f"refused without need: {error}"
        return
    if isinstance(their, Exception):
        yield f"loaded what transformers refuses: {their}"
        return
    yield from _names(ours, their)
    yield from _texts(ours, their)
    yield from _conversations(ours, their)


def refused(drawn: Drawn) -> bool:
    """Return whether zoo refuses the directory."""
    try:
        Tokenizer.from_directory(drawn.path)
    except DataError:
        return True
    return False


def _reason_to_refuse(drawn: Drawn, their: Any) -> str:
    """Why a directory may be refused: transformers does, or a token that it names got an id of no file."""
    if isinstance(their, Exception):
        return str(their) or type(their).__name__
    if not getattr(their, "is_fast", False):
        return "slow"
    names = {name: getattr(their, name, None) for name in ("bos_token", "eos_token", "pad_token", "sep_token")}
    return ", ".join(f"{name} {text}" for name, text in names.items() if text and text not in drawn.defined)


def _names(ours: Tokenizer, their: Any) -> Iterator[str]:
    for name in ("bos", "eos"):
        own, id = getattr(ours, f"{name}_id"), getattr(their, f"{name}_token_id")
        # Without a name there may be an id in config.json, which a model generates with.
        if own != id and id is not None:
            yield f"{name}_id {own}, not {id}"
    if their.pad_token_id is not None and ours.pad_id != their.pad_token_id and their.pad_token in ours.special:
        yield f"pad_id {ours.pad_id}, not {their.pad_token_id}"
    empty = _attempt(lambda: their("").input_ids)
    if (ours.bos_id in ours.begin_ids) != (ours.bos_id in empty[:1]):
        yield f"begin_ids {ours.begin_ids}, but an empty text is {empty}"
    for id in (ours.bos_id, ours.eos_id):
        if id is not None and id >= ours.vocab_size:
            yield f"id {id} is behind the vocabulary of {ours.vocab_size}"


def _texts(ours: Tokenizer, their: Any) -> Iterator[str]:
    special = [token.content for token in their.added_tokens_decoder.values() if token.special]
    for text in TEXTS:
        if any(content in text for content in special):
            continue  # stays text in zoo
        whole = _attempt(lambda text=text: their(text).input_ids)
        got = _attempt(lambda text=text: ours.encode(text, add_special=True))
        if not _same(got, whole):
            yield f"tokens of {text!r}: {got}, not {whole}"
        bare = _attempt(lambda text=text: [*ours.begin_ids, *ours.encode(text)])
        if isinstance(whole, list) and whole[: len(bare)] != bare:
            yield f"what begins {text!r}: {bare}, not {whole}"


def conversations(count: int = 20) -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Conversations and what else is given to the template. No special token stands in their text."""
    rng = random.Random(7)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"x": 1, "\u00e9": [None, True]}}}]
    for number in range(count):
        messages = [{"role": "system", "content": rng.choice(TEXTS)}] if number % 3 == 0 else []
        for _ in range(rng.randint(1, 3)):
            messages += [
                {"role": "user", "content": rng.choice(TEXTS)},
                {"role": "assistant", "content": rng.choice(TEXTS)},
            ]
        prompt = number % 2 == 1
        given: dict[str, Any] = {"add_generation_prompt": prompt}
        given |= {"tools": tools} if number % 4 == 1 else {}
        given |= {"documents": [{"title": "T <&>", "text": "x"}]} if number % 5 == 2 else {}
        given |= {"style": "brief"} if number % 4 == 3 else {}
        yield messages[:-1] if prompt else messages, given


def _conversations(ours: Tokenizer, their: Any) -> Iterator[str]:
    # The one thing that differs on purpose: the day is always the same.
    for name, text in ours.templates.items():
        if "strftime_now" in text:
            dated = text.replace("strftime_now is defined", "true").replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
            own = their.chat_template
            their.chat_template = {**own, name: dated} if isinstance(own, dict) else dated
    for messages, given in conversations():
        expected = _attempt(
            lambda m=messages, g=given: their.apply_chat_template(m, tokenize=True, return_dict=False, **g)
        )
        got = _attempt(lambda m=messages, g=given: ours.encode_rendered(ours.render(m, **g))[0])
        if not _same(got, expected):
            yield f"conversation {messages} with {given}: {got}, not {expected}"


def _attempt(call: Callable[[], Sequence[int]]) -> list[int] | str:
    """Return ids, or what a refusal says. zoo refuses by a DataError of one line and nothing else."""
    try:
        return list(call())
    except DataError as error:
        return str(error).replace("\n", "!")
    except Exception as error:
        return f"!{type(error).__name__}: {error}"


def _same(ours: list[int] | str, theirs: list[int] | str) -> bool:
    if isinstance(ours, str):
        return isinstance(theirs, str) and "!" not in ours
    return ours == theirs
