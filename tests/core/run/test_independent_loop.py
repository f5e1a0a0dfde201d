"""Real runs beside a training loop that shares nothing with them but files: every number and every weight to 1e-12.

The loop is transformers' own model in fp64 (tests/harness/wide.py), called with one document at a time, torch's AdamW
and torch's clipping. Tokens and labels come from the text by transformers' tokenizer and its `{% generation %}` mask.
Of the run it is told only which documents were packed into which row.

The balance loss of a row is transformers' `load_balancing_loss_func` of the router logits of all its documents, one
after another, with an attention mask that is 0 for the row's padding; a step has the mean over its rows. One row is
what transformers sees as a batch of one, so this is its own definition at a batch of one and gradient accumulation.
"""

from __future__ import annotations

import contextlib
import json
import math

import pytest
import torch
import transformers
from torch.nn import functional

import zoo
from tests.harness import wide
from tests.harness.small_runs import FIELDS
from tools.made_tokenizer import LLAMA3, write_tokenizer
from tools.reference import FAMILIES
from zoo.cli.main import main
from zoo.core.data.rows import RowStream
from zoo.core.run.metrics import read_metrics

SEQ, BATCH, BALANCE = 100, 2, 0.05
MODELING = {"llama3": "llama", "mixtral": "mixtral", "nemotron": "nemotron"}
MORE = {
    "llama3": {"tie_word_embeddings": True, "attention_bias": True},
    "nemotron": {"partial_rotary_factor": 0.5, "mlp_bias": True, "head_dim": 8},
    "mixtral": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "output_router_logits": True,
        "router_aux_loss_coef": BALANCE,
        "sliding_window": None,
    },
}
FIRST = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1, "clip": 1.0}
CHANGES = [
    {},
    {"optim.weight_decay": 0.7},
    {"optim.beta1": 0.5},
    {"optim.beta2": 0.7},
    {"optim.eps": 1e-3},
    {"optim.lr": 3e-2},
    {"optim.clip": 0.05},
    {"optim.clip": 0},
    {"schedule.decay": "linear", "schedule.final": 0.5},
    {"schedule.warmup": 4},
    {
        "optim.weight_decay": 0.3,
        "optim.beta1": 0.7,
        "optim.beta2": 0.8,
        "optim.eps": 1e-4,
        "optim.lr": 2e-2,
        "schedule.decay": "constant",
    },
]
"""What the command of a resumed run says anew. Each alone, so that none hides behind another."""


# The data, and what it means by transformers --------------------------------------------------------


WORDS = "Paris is the capital of France, hello there, how are you today? "


DATA_SETS = ([20], [30], [40], [50], [60, 70, 80, 90, 100])
"""Lengths of samples, in hundredths of a row, that are never packed together: rows are exactly so full.

A data set of one sample has it once a pass, and of those longer than half a row each takes one.
"""


def sized(tokens):
    """A sample of exactly so many tokens: no digit is merged with the next, and bos and eos are two."""
    digits = "".join(str(7 * place * place % 10) for place in range(tokens - 2))
    return {"prompt": digits[: tokens // 3], "completion": digits[tokens // 3 :]}


def records(kind):
    """Samples whose lengths leave rows of SEQ tokens between a fifth and entirely full."""
    if kind == "short":
        return [{"prompt": "the", "completion": " capital"}]
    if isinstance(kind, list):
        return [sized(SEQ * hundredths // 100) for hundredths in kind]
    sizes = [40, 15, 62, 9, 75, 30, 51] if kind == "completions" else [12, 30, 5, 40, 22]
    texts = [(WORDS * 3)[i : i + size] for i, size in enumerate(sizes)]
    if kind == "completions":
        return [{"prompt": text[: size // 3], "completion": text[size // 3 :]} for text, size in zip(texts, sizes)]
    return [
        {"messages": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": text}]} for text in texts
    ]


def documents(folder, samples):
    """Each sample's tokens to its shifted labels."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )
    answer = "{{ m['content'] | trim }}{{ '<|eot_id|>' }}"
    assert answer in LLAMA3
    marked = LLAMA3.replace(
        answer,
        "{% if m['role'] == 'assistant' %}{% generation %}"
        + answer
        + "{% endgeneration %}{% else %}"
        + answer
        + "{% endif %}",
    )
    found = {}
    for sample in samples:
        if "messages" in sample:
            made = tokenizer.apply_chat_template(
                sample["messages"], chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, trained = made["input_ids"], made["assistant_masks"]
        else:
            prompt = tokenizer(sample["prompt"])["input_ids"]
            answer_ids = [
                *tokenizer(sample["completion"], add_special_tokens=False)["input_ids"],
                tokenizer.eos_token_id,
            ]
            ids, trained = prompt + answer_ids, [0] * len(prompt) + [1] * len(answer_ids)
        targets = [token if is_trained else -100 for token, is_trained in zip(ids, trained, strict=True)]
        found[tuple(ids)] = [*targets[1:], -100]
    return found


# The two sides --------------------------------------------------------------------------------------


class Loop:
    """transformers and torch."""

    def __init__(self, family, folder):
        self.module = wide.modeling(MODELING[family])
        original = getattr(transformers, FAMILIES[family].model.__name__)
        self.model = getattr(self.module, original.__name__).from_pretrained(folder, dtype=torch.float64)
        if FAMILIES[family].routes:
            self.model.set_experts_implementation("eager")
        self.routes = FAMILIES[family].routes
        groups = [[p for p in self.model.parameters() if (p.ndim > 1) is matrix] for matrix in (True, False)]
        self.optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=0.0)
        self.step = 0

    def train(self, rows, optim, rate):
        """One step on rows of (documents with their labels, number of padding tokens), with these settings."""
        trained = sum(label != -100 for documents, _ in rows for _, labels in documents for label in labels)
        loss, reports = torch.zeros((), dtype=torch.float64), []
        for documents, padding in rows:
            logits = []
            for ids, labels in documents:
                out = self.model(torch.tensor([ids]), use_cache=False, **self._more())
                loss = loss + functional.cross_entropy(out.logits[0], torch.tensor(labels), reduction="sum") / trained
                logits.append(out.router_logits if self.routes else ())
            if self.routes:
                aux, load = self._balance(logits, padding)
                loss = loss + BALANCE * aux / len(rows)
                reports.append((aux.item(), load))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), optim["clip"] or math.inf)
        for group, decay in zip(self.optimizer.param_groups, (optim["weight_decay"], 0.0), strict=True):
            betas = optim["beta1"], optim["beta2"]
            group.update(lr=optim["lr"] * rate(self.step), betas=betas, eps=optim["eps"], weight_decay=decay)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        lr = self.optimizer.param_groups[0]["lr"]
        return {"loss": loss.item(), "grad_norm": norm.item(), "lr": lr, **_reported(reports)}

    def _more(self):
        return {"output_router_logits": True} if self.routes else {}

    def _balance(self, logits, padding):
        """transformers' balance loss of a row, and how many assignments each expert got."""
        config = self.model.config
        experts, top_k = config.num_local_experts, config.num_experts_per_tok
        # Whatever a router would say of padding, it is masked.
        layers = [torch.cat([*of_layer, torch.zeros(padding, experts).double()]) for of_layer in zip(*logits)]
        real = len(layers[0]) - padding
        mask = torch.tensor([[1] * real + [0] * padding])
        aux = self.module.load_balancing_loss_func(tuple(layers), experts, top_k, mask)
        chosen = torch.cat([layer[:real].topk(top_k).indices.flatten() for layer in layers])
        return aux, chosen.bincount(minlength=experts)

    def weights(self, family):
        return FAMILIES[family].in_our_names(dict(self.model.named_parameters()))


def _reported(reports):
    """The mean balance loss of rows, and the experts' shares of all assignments of the step."""
    if not reports:
        return {}
    total = sum(counts for _, counts in reports)
    loads = {f"expert_load.{e}": share for e, share in enumerate((total.double() / total.sum()).tolist())}
    return {"aux_loss": sum(aux for aux, _ in reports) / len(reports), **loads}


def rate(steps, *, warmup=None, decay="cosine", final=0.1):
    """The share of the learning rate by step: what docs/training.md says."""
    warm = max(1, round(0.03 * steps)) if warmup is None else warmup

    def share(step):
        if step < warm:
            return (step + 1) / warm
        done = (step - warm) / max(1, steps - 1 - warm)
        left = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[decay]
        return final + (1 - final) * left

    return share


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors here are too small for more, which wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """family -> a checkpoint as transformers writes it, with a tokenizer."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = folder = tmp_path_factory.mktemp(family)
            torch.manual_seed(5)
            known = FAMILIES[family]
            model = known.model(known.config(**FIELDS | MORE[family]))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.ndim == 1:
                        parameter += 0.3 * torch.randn_like(parameter)
            model.save_pretrained(folder)
            write_tokenizer(folder, "llama3")
        return made[family]

    return make


@contextlib.contextmanager
def taken(monkeypatch):
    """The rows that a run takes, in order."""
    rows, take = [], RowStream.take

    def record(self, count):
        found = take(self, count)
        rows.extend(found)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(RowStream, "take", record)
        yield rows


def run(folder, out, data, steps, changes, monkeypatch):
    """`zoo finetune` to so many steps; the rows it took."""
    settings = {f"optim.{name}": value for name, value in FIRST.items()} | changes
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    words += [
        "--set",
        "log.peak_tflops=1",
        "--from",
        folder,
        "--data",
        data,
        "--seq",
        SEQ,
        "--global-batch",
        BATCH,
        "--dtype",
        "float64",
    ]
    with taken(monkeypatch) as rows:
        family = json.loads((folder / "config.json").read_text())["model_type"]
        name = next(name for name, model_type in MODELING.items() if model_type == family)
        assert main(["finetune", name, *map(str, words), "--steps", str(steps), "--out", str(out)]) == 0
    return rows


def by_step(rows, known):
    """Rows of a run by step, as documents with the labels that transformers gives them."""
    parts = []
    for row in rows:
        found = [tuple(row.tokens[start:stop].tolist()) for start, stop in row.documents]
        parts.append(([(list(ids), known[ids]) for ids in found], SEQ - sum(map(len, found))))
    return [parts[i : i + BATCH] for i in range(0, len(parts), BATCH)]


def assert_same(found, wanted, what):
    assert found.keys() >= wanted.keys(), what
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-12, abs=1e-15), (what, name)


def assert_same_weights(out, loop, family):
    ours = dict(zoo.load(out).named_parameters())
    theirs = loop.weights(family)
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        assert ours[name].dtype == torch.float64
        assert (ours[name] - wanted).abs().max() <= 1e-12 * wanted.abs().max(), name


def trained(family, kind, commands, checkpoint, tmp_path, monkeypatch):
    """Train by commands (up to which step, what it says anew); compare after each step. Return how full rows were."""
    folder, out, data = checkpoint(family), tmp_path / "run", tmp_path / "data.jsonl"
    samples = records(kind)
    tmp_path.mkdir(exist_ok=True)
    data.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    known, loop = documents(folder, samples), Loop(family, folder)
    fills, now = [], dict(FIRST)
    now_schedule = {}
    for steps, said in commands:
        start = loop.step
        rows = by_step(run(folder, out, data, steps, said, monkeypatch), known)
        now |= {key.removeprefix("optim."): value for key, value in said.items() if key.startswith("optim.")}
        now_schedule |= {key.removeprefix("schedule."): v for key, v in said.items() if key.startswith("schedule.")}
        for number in range(start, steps):
            wanted = loop.train(rows[number - start], now, rate(steps, **now_schedule))
            assert_same(read_metrics(out / "metrics.jsonl")[number], wanted, (family, kind, number + 1))
            fills += [(SEQ - padding) / SEQ for _, padding in rows[number - start]]
        assert_same_weights(out, loop, family)
    return fills


def resumed(changes):
    """Three steps, and two of a resumed run with changes."""
    return [(3, {}), (5, changes)]


@pytest.mark.parametrize("kind", ["chats", "completions", "short"])
@pytest.mark.parametrize("family", MODELING)
def test_every_number_and_weight_is_the_independent_loops(family, kind, checkpoint, tmp_path, monkeypatch):
    fills = trained(family, kind, resumed(CHANGES[-1]), checkpoint, tmp_path, monkeypatch)
    assert min(fills) < 1, "rows must have padding"
    if kind == "short":
        assert max(fills) < 0.3


@pytest.mark.parametrize("changes", CHANGES[:-1], ids=str)
def test_a_resumed_run_uses_what_its_command_says(changes, checkpoint, tmp_path, monkeypatch):
    trained("llama3", "completions", resumed(changes), checkpoint, tmp_path, monkeypatch)


@pytest.mark.parametrize("family", MODELING)
def test_rows_that_are_20_to_100_percent_full(family, checkpoint, tmp_path, monkeypatch):
    fills = set()
    for lengths in DATA_SETS:
        # The emptiest row of a pass goes on into the next one: after two passes all rows have come.
        command = (len(lengths) + 1) * 2 // BATCH, {}
        fills.update(trained(family, lengths, [command], checkpoint, tmp_path / str(lengths[0]), monkeypatch))
    assert fills == {tenth / 10 for tenth in range(2, 11)}
