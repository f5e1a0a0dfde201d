"""The text side of the embedded tiny model: corpus and split, tokenizer, n-gram baselines, held-out loss."""

from __future__ import annotations

import hashlib
import json
import math
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F

from zoo.testing.recall import MARKER, NUMBERS

VOCABULARY = 2048
BOS, EOS, PAD, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|eot_id|>"
SPECIALS = (BOS, EOS, PAD, "<|start_header_id|>", "<|end_header_id|>", EOT, "<|eom_id|>", MARKER)
RESERVED = tuple(f"<|reserved_special_token_{i}|>" for i in range(8))
HELD_OUT_ONE_IN = 20

SKIPPED = {"site-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload"}
"""Folders of tests, of other people's packages and of build products."""

# Llama-3's own split: words with the sign before them, numbers in threes, signs, line ends, blanks.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

Logits = Callable[[Tensor], Tensor]
"""tokens [B, T] to logits [B, T, V]."""


# Corpus -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Document:
    """One source file; `name` is its path relative to the library, with forward slashes."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Every 20th file by a hash of its name, so the same files on every machine and Python."""
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def is_corpus_file(name: Path) -> bool:
    """Whether a relative path is source that every installation has: no tests, no packages, nothing generated."""
    folders = set(name.parts[:-1])
    return not folders & SKIPPED and not name.parts[0].startswith(("config-", "_sysconfigdata"))


def stdlib_documents() -> list[Document]:
    """The running interpreter's standard library, sorted by name; files that are not UTF-8 are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not is_corpus_file(name):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            documents.append(Document(name.as_posix(), text))
    return documents


def encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Each document as `bos text eos`, the form in which `zoo finetune` reads text."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    encoded = tokenizer.encode_batch([document.text for document in documents], add_special_tokens=False)
    return [np.array([bos, *each.ids, eos], dtype=np.int64) for each in encoded]


# Tokenizer ----------------------------------------------------------------------------------------


def _splitter(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train_tokenizer(documents: Sequence[Document]) -> Tokenizer:
    """Byte-level BPE plus one token for each of 000 to 999 plus markers: 2,048 entries in all.

    Digits are kept apart while merges are learned; three-digit groups are then whole entries, found without
    merges (`ignore_merges`, as in Llama-3's file), so that a run of digits costs one token for every three.
    """
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = _splitter(PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"))
    size = VOCABULARY - len(NUMBERS) - len(SPECIALS) - len(RESERVED)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator((document.text for document in documents), trainer)
    learned = json.loads(learner.to_str())["model"]
    vocabulary = dict(learned["vocab"])
    for number in NUMBERS:
        vocabulary[number] = len(vocabulary)
    merges = [tuple(merge) for merge in learned["merges"]]
    return _finish(Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True)))


def _finish(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.pre_tokenizer = _splitter(PATTERN)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIALS, *RESERVED])
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, bos)]
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, out: Path, *, window: int) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja."""
    tokenizer.save(str(out / "tokenizer.json"))
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    settings = {
        **names,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": window,
    }
    for name, fields in (("tokenizer_config.json", settings), ("special_tokens_map.json", names)):
        (out / name).write_text(json.dumps(fields, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)


# Held-out loss and its baselines ------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Baselines:
    """Mean loss of two count models on the held-out tokens, nats a token."""

    unigram: float
    bigram: float


def baselines(
    train: Sequence[np.ndarray[Any, np.dtype[np.int64]]], held_out: Sequence[np.ndarray[Any, np.dtype[np.int64]]]
) -> Baselines:
    """Unigram and bigram with add-k smoothing, counted on `train`.

    k is the best of a grid *on the held-out tokens*: the baselines are given every advantage.
    """
    counts = np.zeros((VOCABULARY, VOCABULARY), dtype=np.float64)
    for document in train:
        np.add.at(counts, (document[:-1], document[1:]), 1.0)
    before = np.concatenate([document[:-1] for document in held_out])
    after = np.concatenate([document[1:] for document in held_out])
    grid = [10.0**power for power in np.arange(-4.0, 1.1, 0.25)]
    unigram = counts.sum(0, keepdims=True)
    zeros = np.zeros_like(before)
    return Baselines(
        unigram=min(_add_k_loss(unigram, zeros, after, k) for k in grid),
        bigram=min(_add_k_loss(counts, before, after, k) for k in grid),
    )


def _add_k_loss(
    counts: np.ndarray[Any, np.dtype[np.float64]],
    before: np.ndarray[Any, np.dtype[np.int64]],
    after: np.ndarray[Any, np.dtype[np.int64]],
    k: float,
) -> float:
    seen = counts[before, after] + k
    total = counts.sum(1)[before] + k * counts.shape[1]
    return float(-np.log(seen / total).mean())


@torch.no_grad()
def held_out_loss(
    logits: Logits, documents: Sequence[np.ndarray[Any, np.dtype[np.int64]]], *, window: int, rows: int = 8
) -> float:
    """Mean loss in nats over every token but each document's first, in windows that start afresh at position 0.

    A window takes `window` tokens in and predicts the token after each; windows of a document do not overlap.
    """
    pieces = [d[i : i + window + 1] for d in documents for i in range(0, len(d) - 1, window)]
    pieces.sort(key=len, reverse=True)
    total, count = 0.0, 0
    for start in range(0, len(pieces), rows):
        group = pieces[start : start + rows]
        padded = np.full((len(group), len(group[0])), -100, dtype=np.int64)
        for row, piece in zip(padded, group, strict=True):
            row[: len(piece)] = piece
        tokens = torch.from_numpy(padded)
        labels = tokens[:, 1:]
        out = logits(tokens[:, :-1].clamp(min=0)).flatten(0, 1).float()
        total += F.cross_entropy(out, labels.flatten(), reduction="sum", ignore_index=-100).item()
        count += int((labels != -100).sum())
    return total / count


def bits_per_byte(loss: float, documents: Sequence[Document], *, tokens: int) -> float:
    """A loss in nats a token as bits a byte of the UTF-8 text, which tokenizers cannot flatter."""
    return loss * tokens / math.log(2) / sum(len(document.text.encode()) for document in documents)
