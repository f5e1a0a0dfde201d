"""Every product of degrees is taken or refused before anything starts, as arithmetic says; what is taken runs.

docs/layouts.md has both tables, the layouts proven and the refusals, as they are here.
"""

from __future__ import annotations

import random
import re
from itertools import product
from pathlib import Path

import pytest

from tests.distributed import test_layout_matrix as matrix
from tests.harness import layouts

PAGE = (Path(__file__).parents[2] / "docs" / "layouts.md").read_text()
DEGREES = (1, 2, 4, 8)
MODELS = ("llama", "mixtral", "nemotron")
"""What arithmetic can tell apart."""
KINDS, SCHEDULES = ("fsdp", "zero1", "ddp"), ("1f1b", "gpipe", "interleaved", "zero-bubble", "zbv")
BLOCKS = 8

REFUSALS = (
    ("llama", "dp_shard2 ep2", "has none", "`ep` deals out experts, and a dense model has none"),
    ("mixtral", "dp_shard2 ep4", "must divide", "`ep` folds over `dp_shard` x `cp` and must divide their product"),
    ("mixtral", "dp_shard3 ep3", "does not divide the 8 experts", "`ep` must divide the number of experts"),
    (
        "mixtral",
        "dp_shard10 ep2",
        "only dim 0 may be cut unevenly",
        "`fsdp` and `zero1` share an expert over what `ep` leaves; FSDP2 cuts unevenly on dim 0 only, which `ep` has. "
        "`ddp` takes it",
    ),
    (
        "llama",
        "tp8",
        "does not divide the 4 key/value heads",
        "`tp` must divide query heads, K/V heads, every dim it cuts and the vocabulary: over a dim that `tp` cut "
        "unevenly, FSDP2's strided shards have wrong places",
    ),
    (
        "mixtral",
        "tp2 no-sp",
        "layout.sequence_parallel=false",
        "experts under `tp` need sequence parallelism, else each token would reach its experts once a rank",
    ),
    ("llama", "pp4 zbv layers4", "8 stages", "each stage of a pipeline needs a block"),
    ("llama", "pp4 rows2", "at least 4", "torch's `1f1b` wants a microbatch for every rank of `pp`"),
    (
        "llama",
        "pp2 interleaved rows5",
        "rounds of equal size",
        "torch's `interleaved` and `zero-bubble` want rounds of equal size, about one microbatch a rank in each",
    ),
    ("llama", "pp2 virtual2 layers4", "exactly 1", "torch's `1f1b` and `gpipe` run one stage a rank"),
    ("llama", "pp2 interleaved virtual1", "at least 2", "`interleaved` with one stage a rank is `1f1b`"),
    ("llama", "pp2 zbv virtual3 layers8", "exactly 2", "torch's `zbv` runs two stages a rank, down and back up"),
    (
        "llama",
        "pp2 cp4",
        "is no multiple of --cp 4",
        "torch's stages take messages of one shape, so under `pp` every rank of `cp` has equally many tokens",
    ),
    (
        "nemotron-nas",
        "pp4",
        "without any 'attention'",
        "what enters a model by a seam, as attention does, needs one on every rank of `pp`",
    ),
    (
        "llama",
        "dp_shard2 ddp keep",
        "layout.reshard=false",
        "`zero1` and `ddp` keep weights from the first forward to the last backward anyway",
    ),
    (
        "llama",
        "zbv",
        "--pp is 1",
        "a schedule says nothing without `pp`, `no-sp` without `tp`, a scheme without `cp`",
    ),
    ("llama", "cp32", "cannot be shared out", "every rank of `cp` has a token"),
    ("llama", "dp_shard2 rows3", "must be a multiple of", "every data-parallel rank has equally many rows"),
)
"""Model, words of tests/harness/layouts.py, what is said, and why."""


def points():
    """Every product of degrees up to 8 ranks: words, and reasons to refuse them for a model; the rest is drawn."""
    draw = random.Random(0)
    for pp, dr, ds, cp, tp, ep in product(DEGREES, repeat=6):
        if pp * dr * ds * cp * tp > 8:
            continue
        schedule = draw.choice(SCHEDULES) if pp > 1 else None
        degrees = {"pp": pp, "dp_replicate": dr, "dp_shard": ds, "cp": cp, "tp": tp, "ep": ep}
        more = [f"{axis}{degree}" for axis, degree in degrees.items() if degree > 1]
        more += [schedule] if schedule else []
        more += [draw.choice(KINDS)] if dr * ds * cp > 1 else []
        more += ["no-sp"] if tp > 1 and draw.random() < 0.4 else []
        yield " ".join([*more, f"layers{BLOCKS}"]), degrees, schedule


def reasons(model, words, degrees, schedule):
    """By arithmetic of our own, patterns of which a refusal must match one; empty where there is nothing to refuse."""
    config = layouts.config(model, BLOCKS)
    sparse, per_rank = model == "mixtral", 2 if schedule in ("interleaved", "zbv") else 1
    if degrees["dp_shard"] * degrees["cp"] % degrees["ep"]:
        yield "--ep .*must divide --dp-shard"
    if degrees["ep"] > 1 and not sparse:
        yield "--ep .*has none"
    if config.num_key_value_heads % degrees["tp"]:
        yield "--tp .*does not divide the .*heads"
    if degrees["tp"] > 1 and sparse and "no-sp" in words:
        yield "--tp .*sequence_parallel"
    if degrees["pp"] * per_rank > BLOCKS:
        yield "--pp .*stages"
    if degrees["pp"] > 1 and layouts.SEQ % degrees["cp"]:
        yield "--seq .*--cp"


def taken():
    """All (model, words) that arithmetic has nothing against."""
    every = product(MODELS, points())
    return [(model, words) for model, (words, *more) in every if not [*reasons(model, words, *more)]]


@pytest.mark.parametrize("model", MODELS)
def test_every_product_of_degrees_is_refused_where_arithmetic_says_so_and_nowhere_else(model):
    for words, *more in points():
        said, expected = layouts.refusal(model, words), [*reasons(model, words, *more)]
        assert (said is None) == (not expected), (words, said, expected)
        if said is not None:
            assert any(re.search(pattern, said) for pattern in expected), (words, said, expected)
            assert "\n" not in said


@pytest.mark.dist
@pytest.mark.parametrize(("model", "words"), random.Random(1).sample(taken(), 6))
def test_what_is_not_refused_runs_and_equals_one_process(model, words):
    layouts.check([model], words)


@pytest.mark.parametrize(("model", "words", "said", "why"), REFUSALS)
def test_what_torch_or_arithmetic_forbids_is_refused_in_one_line(model, words, said, why):
    sentence = layouts.refusal(model, words)
    assert sentence is not None
    assert said in sentence
    assert "\n" not in sentence


def table(head, lines):
    """A table as the page has it."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))


def test_the_page_has_every_layout_proven_and_no_other():
    lines = []
    for words in matrix.MATRIX:
        ranks = layouts.choose(matrix.models(words)[0], words).degrees.world_size
        lines.append([str(ranks), f"`{words}`", *(matrix.verdict(model, words) for model in matrix.MODELS)])
    wanted = table(["ranks", "layout", *matrix.MODELS], lines)
    assert wanted in PAGE, f"docs/layouts.md must have:\n{wanted}"


def test_the_page_has_every_refusal_with_its_reason():
    wanted = table(["model", "layout", "why it is refused"], [[m, f"`{words}`", why] for m, words, _, why in REFUSALS])
    assert wanted in PAGE, f"docs/layouts.md must have:\n{wanted}"
