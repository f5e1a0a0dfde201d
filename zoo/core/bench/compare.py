"""What `zoo bench attention` is asked, resolved and checked, and the answer computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from zoo.core.attention.forecast import Rates
from zoo.core.bench.figures import Figures, survey
from zoo.core.bench.mask_text import MaskWords
from zoo.core.bench.measure import Timing, Trial, affordable_length, measure
from zoo.core.contracts.attention import AttentionProblem, ContextScheme, HeadShape
from zoo.core.errors import UsageError, did_you_mean
from zoo.core.humanize import format_tokens, parse_tokens
from zoo.core.job.job import Job
from zoo.core.launch.launcher import inside_launcher
from zoo.core.machine.device import accelerator_type, num_accelerators, num_cores
from zoo.core.model.answers import loaded_spec, parsed
from zoo.core.plan.choices import choose_attention
from zoo.core.plan.schemes import load_scheme, rates
from zoo.core.registry.decisions import Registry
from zoo.core.sequence.mask import Mask
from zoo.core.sequence.row_layout import BALANCES

DEFAULT_HEADS = HeadShape(num_heads=32, num_kv_heads=8, head_dim=128)
_DTYPES = ("auto", "float32", "bfloat16", "float64")
Say = Callable[[str], None]
A = TypeVar("A")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Times on real ranks, which may be fewer, with shorter rows, than what was asked about."""

    ranks: int
    seq: int
    repeats: int
    schemes: dict[str, Timing]
    refused: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Everything that is printed."""

    model: str | None
    """Family and size."""
    problem: AttentionProblem
    words: MaskWords
    mask: Mask
    seed: int
    cp: int
    balance: str
    backend: str
    why_backend: str
    rates: Rates
    schemes: dict[str, Figures]
    refused: dict[str, str]
    """Scheme to the reason why it cannot."""
    measured: Measured | None


def answer(
    registry: Registry,
    *,
    say: Say,
    model: str | None,
    size: str | None,
    heads: int | None,
    kv_heads: int | None,
    head_dim: int | None,
    seq: str,
    cp: int,
    mask_text: str,
    seed: int,
    schemes: str | None,
    attn: str,
    balance: str,
    dtype: str,
    measure: bool,
    ranks: int | None,
    repeats: int,
) -> Answer:
    """Resolve and check what was typed, then ask every scheme's plan, and the clock if told to. Raises UsageError."""
    length, words = parse_tokens(seq), MaskWords.parse(mask_text)
    if cp > length:
        raise UsageError(f"--seq {seq} cannot be shared out over --cp {cp} ranks; lower --cp to {length}")
    _one_of("--balance", balance, BALANCES)
    _one_of("--dtype", dtype, _DTYPES)
    num_ranks = _num_ranks(measure, ranks, cp)
    label, shape = _shape(registry, model, size, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    problem = _problem(shape, dtype)
    backend, why = choose_attention(Job.from_settings({"attention.backend": (attn, "--attn")}), registry, [problem])
    wanted = _schemes(registry, schemes)
    # Without names it is a choice among all, from which one that fails is left out.
    ask = registry.context_schemes.asked if schemes is None else _answers
    reasons = ask(lambda scheme: scheme.check(problem, length, cp), wanted)
    able, refused = _able(wanted, reasons)
    mask, speed = words.mask(length, seed=seed), rates(problem, cp, None)
    figures = ask(lambda scheme: survey(scheme, mask, cp, shape, speed, balance=balance), able)
    for line in registry.passed_over():
        say(f"passed over: {line}")
    found = Answer(
        model=label,
        problem=problem,
        words=words,
        mask=mask,
        seed=seed,
        cp=cp,
        balance=balance,
        backend=backend.name,
        why_backend=why,
        rates=speed,
        schemes=figures,
        refused=refused,
        measured=None,
    )
    usable = {name: scheme for name, scheme in wanted.items() if name in figures or name in refused}
    return _timed(found, registry, usable, num_ranks, repeats, say) if num_ranks else found


def _timed(
    found: Answer, registry: Registry, wanted: dict[str, ContextScheme], ranks: int, repeats: int, say: Say
) -> Answer:
    """The answer with times on as many ranks, of rows as long as this machine computes in seconds."""
    problem = found.problem
    length = affordable_length(
        lambda n: found.words.mask(n, seed=found.seed), found.mask.length, problem.heads, problem.dtype, ranks
    )
    able, refused = _able(wanted, _answers(lambda scheme: scheme.check(problem, length, ranks), wanted))
    if not able:
        return replace(found, measured=Measured(ranks=ranks, seq=length, repeats=repeats, schemes={}, refused=refused))
    trial = Trial(
        mask=found.words.mask(length, seed=found.seed),
        heads=problem.heads,
        schemes=tuple(able),
        backend=found.backend,
        dtype=problem.dtype,
        balance=found.balance,
        repeats=repeats,
    )
    shorter = f" ({format_tokens(found.mask.length)} would take too long or not fit)"
    say(
        f"measuring {', '.join(able)} on {ranks} rank{'s' * (ranks != 1)}, rows of {format_tokens(length)} tokens"
        f"{shorter if length < found.mask.length else ''}, {repeats} turn{'s' * (repeats != 1)}"
    )
    times = measure(trial, registry.plugins, ranks)
    return replace(found, measured=Measured(ranks=ranks, seq=length, repeats=repeats, schemes=times, refused=refused))


def _num_ranks(wanted: bool, ranks: int | None, cp: int) -> int:
    """How many ranks to start; 0 for none. Raises UsageError for more than there are accelerators."""
    if not wanted:
        if ranks is not None:
            raise UsageError(f"--ranks {ranks} is the number of ranks to time with; type --measure --ranks {ranks}")
        return 0
    if inside_launcher():
        raise UsageError("zoo bench attention --measure starts its ranks itself; run it without torchrun")
    room = num_accelerators()
    if room and (ranks or 1) > room:
        raise UsageError(f"--ranks {ranks}: this machine has {room} accelerators; type --ranks {room}")
    return ranks or min(cp, room or num_cores())


def _shape(
    registry: Registry,
    model: str | None,
    size: str | None,
    *,
    heads: int | None,
    kv_heads: int | None,
    head_dim: int | None,
) -> tuple[str | None, HeadShape]:
    """The heads of a model's size, or of zoo's default, with what was typed over them."""
    if model is None and size is not None:
        raise UsageError(
            f"--size {size} of which model? Type zoo bench attention MODEL --size {size}; see `zoo models`"
        )
    label, shape = (None, DEFAULT_HEADS) if model is None else _model_shape(registry, model, size)
    shape = HeadShape(
        num_heads=heads or shape.num_heads,
        num_kv_heads=kv_heads or (min(shape.num_kv_heads, heads) if heads else shape.num_kv_heads),
        head_dim=head_dim or shape.head_dim,
    )
    if shape.num_heads % shape.num_kv_heads:
        raise UsageError(
            f"--heads {shape.num_heads} --kv-heads {shape.num_kv_heads}: the query heads are shared evenly by the "
            f"key/value heads; type --kv-heads with a divisor of {shape.num_heads}"
        )
    return label, shape


def _model_shape(registry: Registry, model: str, size: str | None) -> tuple[str, HeadShape]:
    entry = registry.models.get(model)
    size = size or entry.default_size
    if size not in entry.sizes:
        hint = did_you_mean(size, entry.sizes)
        raise UsageError(f"{model} has no size '{size}'{f' ({hint})' if hint else ''}. Sizes: {', '.join(entry.sizes)}")
    spec = loaded_spec(registry.models, model)
    config = parsed(spec, entry.sizes[size])
    ((shape, _),) = Counter(spec.heads(config)).most_common(1)
    return f"{model} {size}", shape


def _problem(shape: HeadShape, dtype: str) -> AttentionProblem:
    return AttentionProblem(
        device=accelerator_type() or "cpu",
        dtype=dtype if dtype != "auto" else "bfloat16" if accelerator_type() else "float32",
        head_dim=shape.head_dim,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
    )


def _schemes(registry: Registry, text: str | None) -> dict[str, ContextScheme]:
    """Schemes by the words they were asked for with; every one if none was."""
    if text is not None:
        return {word: load_scheme(registry, word) for word in (word.strip() for word in text.split(","))}
    found: dict[str, ContextScheme] = registry.context_schemes.made()
    if not found:
        said = ["no plugin provides a context scheme; see `zoo plugins`", *registry.passed_over()]
        raise UsageError("; ".join(said))
    return found


def _answers(question: Callable[[ContextScheme], A], schemes: Mapping[str, ContextScheme]) -> dict[str, A]:
    return {name: question(scheme) for name, scheme in schemes.items()}


def _able(
    schemes: Mapping[str, ContextScheme], reasons: Mapping[str, str | None]
) -> tuple[dict[str, ContextScheme], dict[str, str]]:
    """The schemes that can, and the reasons of those that cannot."""
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    return {name: schemes[name] for name in reasons if name not in refused}, refused


def _one_of(option: str, value: str, words: tuple[str, ...]) -> None:
    if value not in words:
        hint = did_you_mean(value, words)
        raise UsageError(f"{option} {value}: it is one of {', '.join(words)}{f' ({hint})' if hint else ''}")
