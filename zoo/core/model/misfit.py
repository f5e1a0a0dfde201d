"""Why the tensors of a checkpoint are not those its config asks for: one cause, and what to type. Reads no data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

_ADAPTER_ATOMS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "base_layer")
_MERGE = "merge it in the program that has it, model.merge_and_unload().save_pretrained(DIR), and give DIR"
_WRAPPERS: Mapping[str, tuple[str, str]] = {
    "base_model": ("a model of peft", _MERGE),
    "module": ("DistributedDataParallel, DataParallel or DeepSpeed", "save what is inside, model.module, once more"),
    "_orig_mod": ("torch.compile", "save what is inside, model._orig_mod, once more"),
    "_fsdp_wrapped_module": ("FSDP", "save its full state dict once more (accelerate: get_state_dict(model))"),
    "_checkpoint_wrapped_module": ("torch's checkpoint_wrapper", "save the model without it once more"),
}
"""Atom of a name, to who puts it there and what to do."""

_MOST = 0.5
"""Share of the names that must agree on a cause."""
_HEADS = 2
"""Atoms before the part of a name that every wrapper keeps: `model.` and one more."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """What names begin with, and what they should begin with instead."""

    found: str
    expected: str
    example: str
    example_expected: str


def why_names_differ(source: object, names: Collection[str], expected: Collection[str]) -> str | None:
    """Return the one cause of names that do not fit and what to type; None if no cause explains most of them."""
    atoms = {atom for name in names for atom in name.split(".")}
    adapter = next((atom for atom in _ADAPTER_ATOMS if atom in atoms), None)
    if adapter is not None:
        return f"{source} has tensors of an adapter that was not merged ({_first(names, adapter)}); {_MERGE}"
    wrappers = [atom for atom in _WRAPPERS if atom in atoms and not _first(expected, atom)]
    prefix = _prefix(names, expected)
    if wrappers and (prefix is None or _names_wrapper(prefix, wrappers)):
        return _of_wrappers(source, names, expected, wrappers, prefix)
    return None if prefix is None else _of_prefix(source, names, expected, prefix)


def _of_wrappers(
    source: object, names: Collection[str], expected: Collection[str], wrappers: list[str], prefix: Prefix | None
) -> str | None:
    plain = {_without(name, wrappers) for name in names}
    if prefix is None and len(plain & set(expected)) < _MOST * len(expected):
        return None
    example = prefix.example if prefix else _first(names, wrappers[0])
    begin = f"begin with '{prefix.found}'" if prefix else f"hold '.{wrappers[0]}.'"
    who = " and ".join(_WRAPPERS[atom][0] for atom in wrappers)
    hints = "; ".join(_WRAPPERS[atom][1] for atom in wrappers)
    return f"{source}: names of its tensors {begin} ({example}), as {who} writes them; {hints}"


def _of_prefix(source: object, names: Collection[str], expected: Collection[str], prefix: Prefix) -> str:
    found = f"begin with '{prefix.found}'" if prefix.found else f"begin without '{prefix.expected}'"
    what = f"{source}: names of its tensors {found} ({prefix.example}, where {prefix.example_expected} is asked for)"
    renamed = {prefix.expected + name.removeprefix(prefix.found) for name in names if name.startswith(prefix.found)}
    absent = [name for name in expected if name not in renamed and name not in names]
    if absent and not prefix.found:
        return f"{what}, and {absent[0]} is missing: the inner model was saved alone; save the whole one, with its head"
    kept = [name for name in names if name in expected]
    if prefix.found:
        new = f"k.replace('{prefix.found}', '{prefix.expected}', 1)"
    else:
        new = f"'{prefix.expected}' + k" if not kept else f"k if k in {kept[:2]} else '{prefix.expected}' + k"
    return (
        f"{what}; rename them with load_file and save_file of safetensors.torch, "
        f"{{{new}: v for k, v in load_file(FILE).items()}}, and in the index where there is one"
    )


def _prefix(names: Collection[str], expected: Collection[str]) -> Prefix | None:
    """The prefix that most names have instead of another; None if most are as they should be, or nothing fits."""
    tails = {tail: name for name in expected for _, tail in _cuts(name, _HEADS)}
    pairs: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], tuple[str, str]] = {}
    for name in names:
        for head, tail in _cuts(name, 8):
            if tail in tails:
                other = tails[tail]
                pair = head, other.removesuffix(tail)
                pairs[pair] += 1
                examples.setdefault(pair, (name, other))
                break
    if not pairs:
        return None
    pair, count = pairs.most_common(1)[0]
    if pair[0] == pair[1] or count < _MOST * len(expected):
        return None
    return Prefix(*pair, *examples[pair])


def _cuts(name: str, most: int) -> Iterator[tuple[str, str]]:
    """A name cut into head and tail at its first dots, the longest tail first; a tail has at least two atoms."""
    atoms = name.split(".")
    for cut in range(min(most, len(atoms) - 2) + 1):
        tail = ".".join(atoms[cut:])
        yield name.removesuffix(tail), tail


def _names_wrapper(prefix: Prefix, wrappers: Iterable[str]) -> bool:
    return any(atom in wrappers for atom in prefix.found.split("."))


def _without(name: str, atoms: Collection[str]) -> str:
    return ".".join(atom for atom in name.split(".") if atom not in atoms)


def _first(names: Collection[str], atom: str) -> str:
    return next((name for name in names if atom in name.split(".")), "")
