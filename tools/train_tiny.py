"""Trains an embedded tiny model on this interpreter's standard library: `python tools/train_tiny.py llama3 --out DIR`.

Two processes of one thread each share every batch: on busy cores they wait for each other far less than two threads.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from tools import tiny_card, tiny_text
from tools.tiny_rows import Kind, RowMaker, TrainRow
from zoo.core.contracts.batch import IGNORE
from zoo.core.contracts.models import ModelSpec
from zoo.core.model.inventory import rule_book
from zoo.core.model.load import ModuleSource
from zoo.core.model.rules import whole
from zoo.core.registry.decisions import Registry
from zoo.core.registry.loading import Plugins
from zoo.testing.recall import Ids, NeedleTokens, needle_row, recall

RANKS = 2
REPORT_EVERY = 25
PEAK_LR, FINAL_LR, WARM_UP_STEPS = 4e-3, 0.05, 50
EMBEDDING_STD, PROJECTION_STD = 0.02, 0.05
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.98), 0.01, 1.0
NEEDLES = 33


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Some steps on rows of one length. `share` of the rows are of `kind`, the others pure text.

    The loss is `answers` * mean over what the row itself answers + `text` * mean over text. In rows of `kind`
    only a quarter of the text counts: enough for what it weighs, and the head is a third of the work.
    """

    kind: Kind
    length: int
    steps: int
    rows: int
    share: float = 1.0
    until: float = 0.0
    """Ends the stage early, once the answers' mean loss over 25 steps is below it."""
    answers: float = 1.0
    text: float = 0.1


# Short strings come first because copying is learned from them soon (250 steps at 32 tokens). A run of twice the size
# that began with strings of 64 tokens still found no needle after 1,175 steps.
LESSONS = (
    Stage(kind="string", length=32, rows=64, steps=1500, until=0.5),
    Stage(kind="string", length=64, rows=32, steps=600, until=0.5),
    Stage(kind="string", length=128, rows=24, steps=300, until=0.5),
    Stage(kind="needles", length=128, rows=32, steps=300, until=0.5),
    Stage(kind="needles", length=256, rows=16, steps=300, until=0.5),
)
PRACTICE = (
    Stage(kind="needles", length=512, rows=12, steps=500, share=1 / 3, answers=0.5, text=1.0),
    Stage(kind="needles", length=1024, rows=8, steps=300, share=1 / 4, answers=0.5, text=1.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """The standard library, encoded, with what draws rows from its training part."""

    tokenizer: Tokenizer
    vocabulary: NeedleTokens
    held_out_documents: Sequence[tiny_text.Document]
    train: Sequence[Ids]
    held_out: Sequence[Ids]

    @classmethod
    def read(cls) -> Corpus:
        documents = tiny_text.stdlib_documents()
        seen = [document for document in documents if not document.held_out]
        unseen = [document for document in documents if document.held_out]
        tokenizer = tiny_text.train_tokenizer(seen)
        return cls(
            tokenizer=tokenizer,
            vocabulary=NeedleTokens.of(tokenizer),
            held_out_documents=unseen,
            train=tiny_text.encode(tokenizer, seen),
            held_out=tiny_text.encode(tokenizer, unseen),
        )

    def rows(self, documents: Sequence[Ids], seed: int) -> RowMaker:
        return RowMaker(documents=documents, vocabulary=self.vocabulary, rng=np.random.default_rng(seed))


# Training -----------------------------------------------------------------------------------------


def load_spec(family: str) -> ModelSpec:
    spec: ModelSpec = Registry(Plugins.load()).models.load(family)
    return spec


def build_model(family: str, seed: int) -> nn.Module:
    """The zoo's own model. Every matrix is drawn here, by sorted name, so that the seed alone fixes the start."""
    spec, card = load_spec(family), tiny_card.CARDS[family]
    model = spec.build(spec.parse({**card.config, **card.while_training}))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() >= 2:
            std = EMBEDDING_STD if "embed_tokens" in name or "lm_head" in name else PROJECTION_STD
            nn.init.normal_(parameter, 0.0, std, generator=generator)
    model.loss = WeightedLoss()
    return model


def labels_of(rows: Sequence[TrainRow], rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B, T], labels [B, T] with IGNORE where nothing counts, and which of them are answers."""
    whole = np.stack([row.tokens for row in rows])
    labels, answers = whole.copy(), np.zeros(whole.shape, dtype=bool)
    for i, row in enumerate(rows):
        answers[i, row.answers] = True
        if len(row.answers):
            labels[i, (rng.random(whole.shape[1]) > 0.25) & ~answers[i]] = IGNORE
        labels[i, row.hidden] = IGNORE
    return torch.from_numpy(whole[:, :-1]), torch.from_numpy(labels[:, 1:]), torch.from_numpy(answers[:, 1:])


class WeightedLoss(nn.Module):
    """In the loss seam: the answers' mean and the text's, weighted. The head sees only rows that count."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = self.text = 1.0
        self.is_answer: Tensor | None = None
        """[B, T], set before each batch."""
        self.means = torch.zeros(2)

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """hidden [B, T, D], weight [V, D], labels [B, T] to the weighted sum of both means, 0-dim."""
        assert self.is_answer is not None
        used = labels != IGNORE
        each = F.cross_entropy(F.linear(hidden[used], weight), labels[used], reduction="none")
        is_answer = self.is_answer[used]
        answers, text = each[is_answer].mean(), each[~is_answer].mean()
        self.means = torch.stack([answers, text]).detach()
        return self.answers * answers.nan_to_num() + self.text * text


def learning_rate(step: int, practised: float) -> float:
    """Linear warm-up, the peak through all lessons, then a cosine down to 5 % over the practice (0 to 1)."""
    cosine = FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * practised))
    return PEAK_LR * min((step + 1) / WARM_UP_STEPS, cosine)


def average_gradients(model: nn.Module) -> None:
    """Over both ranks, in one all-reduce."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / RANKS
    dist.all_reduce(flat)
    for gradient, piece in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(piece.view_as(gradient))


class Trainer:
    """The model, its optimizer and this rank's half of every batch."""

    def __init__(self, family: str, corpus: Corpus, *, seed: int) -> None:
        self.family = family
        self.rank = dist.get_rank()
        self.step, self.tokens = 0, 0
        self.rows = corpus.rows(corpus.train, seed)
        self.model = build_model(family, seed)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), PEAK_LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.start = time.monotonic()

    def run(self, stage: Stage, *, before: float = 0.0, after: float = 0.0) -> None:
        """A stage, as the part of the practice from `before` to `after`."""
        seen: list[Tensor] = []
        for i in range(stage.steps):
            seen.append(self.gradients(stage))
            self.update(before + (after - before) * i / stage.steps)
            if len(seen) == REPORT_EVERY:
                answers, text = self.mean(seen)
                self.report(stage, answers, text)
                seen.clear()
                if answers < stage.until:
                    return

    def gradients(self, stage: Stage) -> Tensor:
        """Those of one batch; returns its losses. Both ranks draw all of it, so that one generator fixes it."""
        mixed = round(stage.rows * stage.share)
        rows = [self.rows.draw(stage.kind if i < mixed else "text", stage.length) for i in range(stage.rows)]
        rng = np.random.default_rng((self.step, self.rank))
        tokens, labels, is_answer = labels_of(rows[self.rank :: RANKS], rng)
        loss = self.model.loss
        loss.answers, loss.text, loss.is_answer = stage.answers, stage.text, is_answer
        out = self.model(tokens, None, None, labels)
        (out if isinstance(out, Tensor) else out.tokens + out.rows).backward()
        self.tokens += RANKS * tokens.numel()
        return loss.means

    def update(self, practised: float) -> None:
        average_gradients(self.model)
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, practised)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def mean(self, seen: Sequence[Tensor]) -> list[float]:
        """Over both ranks, so that both end a stage at the same step."""
        total = torch.stack(list(seen)).mean(0) / RANKS
        dist.all_reduce(total)
        return total.tolist()

    def report(self, stage: Stage, answers: float, text: float) -> None:
        where = f"{time.monotonic() - self.start:5.0f} s  step {self.step}  {stage.kind} {stage.length}"
        if self.rank == 0:
            say(f"{where}  answers {answers:.3f}  text {text:.3f}")

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self.start) / 60


# Measuring ----------------------------------------------------------------------------------------


def recall_at(model: nn.Module, corpus: Corpus, length: int, *, rows: int) -> float:
    """Recall in held-out text with needles at even depths."""
    maker = corpus.rows(corpus.held_out, length)
    drawn = [
        needle_row(
            maker.stream(length), length=length, num_needles=NEEDLES, vocabulary=corpus.vocabulary, rng=maker.rng
        )
        for _ in range(rows)
    ]
    return recall(model, drawn)


def measure(trainer: Trainer, corpus: Corpus, *, seed: int, rows: int) -> tiny_card.Figures:
    """Every figure the README states, measured on the whole held-out part."""
    model, held_out = trainer.model, corpus.held_out
    pairs = zip(corpus.held_out_documents, held_out, strict=True)
    plain = [tokens for document, tokens in pairs if not document.name.startswith("encodings/")]
    counts, plain_counts = tiny_text.baselines(corpus.train, held_out), tiny_text.baselines(corpus.train, plain)
    predicted = sum(len(tokens) - 1 for tokens in held_out)
    return tiny_card.Figures(
        unigram=counts.unigram,
        bigram=counts.bigram,
        loss_512=tiny_text.held_out_loss(model, held_out, window=512),
        loss_window=tiny_text.held_out_loss(model, held_out, window=tiny_card.WINDOW),
        plain_unigram=plain_counts.unigram,
        plain_bigram=plain_counts.bigram,
        plain_loss=tiny_text.held_out_loss(model, plain, window=tiny_card.WINDOW),
        tokens_per_byte=predicted / sum(len(document.text.encode()) for document in corpus.held_out_documents),
        recall_512=recall_at(model, corpus, 512, rows=rows),
        recall_window=recall_at(model, corpus, tiny_card.WINDOW, rows=rows),
        needles=rows * NEEDLES,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        seed=seed,
        steps=trainer.step,
        tokens=trainer.tokens,
        minutes=trainer.minutes,
        python=platform.python_version(),
        torch=torch.__version__,
    )


# Writing ------------------------------------------------------------------------------------------


def write(out: Path, trainer: Trainer, corpus: Corpus, *, seed: int, rows: int = 64) -> None:
    """Write the directory, whole each time. Tied embeddings are stored once, as the hub does."""
    figures = measure(trainer, corpus, seed=seed, rows=rows)
    out.mkdir(parents=True, exist_ok=True)
    markers = {"bos": tiny_text.BOS, "eos": tiny_text.EOS, "pad": tiny_text.PAD, "eot": tiny_text.EOT}
    ids: dict[str, Any] = {name: corpus.tokenizer.token_to_id(token) for name, token in markers.items()}
    spec = load_spec(trainer.family)
    hub = rule_book(spec, spec.parse(tiny_card.CARDS[trainer.family].config)).to_hub(ModuleSource(trainer.model))
    tensors = {name: hub.read(name, whole(hub.shape(name))).clone().contiguous() for name in hub.names()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    tiny_text.write_tokenizer(corpus.tokenizer, out, window=tiny_card.WINDOW)
    tiny_card.write_config(out, trainer.family, **ids)
    tiny_card.write_readme(out, trainer.family, figures)
    say(f"wrote {out}: {figures}")


def say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def work(rank: int, rendezvous: str, family: str, out: Path, seed: int, scale: float) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    corpus = Corpus.read()
    lessons, practice = ([shortened(stage, scale) for stage in stages] for stages in (LESSONS, PRACTICE))
    trainer = Trainer(family, corpus, seed=seed)
    for stage in lessons:
        trainer.run(stage)
    done, total = 0, sum(stage.steps for stage in practice)
    for stage in practice:
        trainer.run(stage, before=done / total, after=(done + stage.steps) / total)
        done += stage.steps
        if rank == 0:
            write(out, trainer, corpus, seed=seed, rows=64 if done == total else 4)
    dist.destroy_process_group()


def shortened(stage: Stage, scale: float) -> Stage:
    return replace(stage, steps=max(1, round(stage.steps * scale)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=sorted(tiny_card.CARDS))
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every stage's steps, to try the script")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(f"{folder}/rendezvous", args.family, args.out, args.seed, args.scale), nprocs=RANKS)


if __name__ == "__main__":
    main()
