"""A directory's tokenizer as transformers loads it: files, classes and special tokens mean what they mean there."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tokenizers import Tokenizer as Backend

from zoo.core.errors import DataError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
TEMPLATES = "additional_chat_templates"

VOCABULARIES = (
    TOKENIZER,
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "tiktoken.model",
    "spiece.model",
)
"""Names of the files that hold a vocabulary. One of them makes a directory a tokenizer's."""

FILES = (
    *VOCABULARIES,
    CONFIG,
    SPECIAL_TOKENS,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
)
"""Names a tokenizer's files have in a Hugging Face directory."""

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that have a name of their own in every tokenizer."""


def tokenizer_files(path: Path) -> tuple[str, ...]:
    """Return the names of the tokenizer files in a directory, `additional_chat_templates/x.jinja` among them."""
    named = sorted(f"{TEMPLATES}/{file.name}" for file in (path / TEMPLATES).glob("*.jinja") if file.is_file())
    return (*(name for name in FILES if (path / name).is_file()), *named)


def has_vocabulary(path: Path) -> bool:
    """Return whether a directory has a file that a tokenizer can be made of."""
    return any((path / name).is_file() for name in VOCABULARIES)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A directory's tokenizer, and its special tokens as the files define them."""

    pretrained: PreTrainedTokenizerFast
    named: Mapping[str, str]
    """Special tokens that have a name (`bos_token`, `sep_token`), by it."""
    undefined: frozenset[str]
    """Tokens that the class names and no file defines. transformers gives them ids behind the vocabulary."""


def load_pretrained(path: Path) -> Loaded:
    """Load what transformers' AutoTokenizer loads. Nothing leaves the machine and no code of the directory runs.

    Raises DataError naming the directory, and the file where one is at fault.
    """
    _check_vocabulary(path)
    said = {name: read_object(path / name) for name in (CONFIG, SPECIAL_TOKENS, "config.json")}
    with _quiet():
        try:
            loaded = _loaded(path, said)
        except BaseException as error:  # a panic of the Rust library is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            _explain(error, path)
    _check_fast(loaded, path)
    # A file may ask for cuts and padding at some length; documents are cut elsewhere.
    loaded.backend_tokenizer.no_truncation()
    loaded.backend_tokenizer.no_padding()
    named = {name: text for name, text in loaded.special_tokens_map.items() if isinstance(text, str)}
    undefined = _undefined(named, loaded, path, said[CONFIG])
    for name in sorted(undefined & set(NAMES)):
        _check_name(name, loaded, path, said)
    defined = {name: text for name, text in named.items() if name not in undefined}
    return Loaded(loaded, defined, frozenset(named[name] for name in undefined))


def _loaded(path: Path, said: Mapping[str, Mapping[str, Any]]) -> Any:
    # Takes a second, and only what tokenizes needs it.
    from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast  # noqa: PLC0415

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if "tokenizer_class" in said[CONFIG] and "auto_map" not in said[CONFIG]:
        # The class is chosen by its name and the model's; a model's own config would only be read for that, and
        # importing one takes a second (torch._dynamo, sympy).
        kept = {key: said["config.json"].get(key) for key in ("model_type", "model_name", "tokenizer_class")}
        known = {key: value for key, value in kept.items() if isinstance(value, str)}
        options["config"] = PretrainedConfig(**known, name_or_path=str(path))
    elif (path / TOKENIZER).is_file() and not (path / "config.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    loaded = AutoTokenizer.from_pretrained(path, **options)
    if type(loaded).__name__.startswith("MistralCommon"):
        # Where mistral-common is installed, its classes go before all others, and they have no offsets. What
        # transformers does without that package gives the same tokens on every machine.
        return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    return loaded


# What is wrong ------------------------------------------------------------------------------------


def _check_vocabulary(path: Path) -> None:
    if not path.is_dir():
        raise DataError(f"{path} is not a directory with a tokenizer; give a Hugging Face directory with --from DIR")
    if not has_vocabulary(path):
        raise DataError(
            f"{path} has no tokenizer.json; copy the tokenizer files of the checkpoint there, "
            "or give a directory that has them with --from DIR"
        )


def _explain(error: BaseException, path: Path) -> NoReturn:
    """Raise DataError for what made transformers fail: a broken file, a package that is not there, or what it says."""
    for name in tokenizer_files(path):
        if name.endswith((".json", ".jinja")):
            read_text(path / name, hint="copy it again from the checkpoint it belongs to")
    if (path / TOKENIZER).is_file():
        try:
            Backend.from_file(str(path / TOKENIZER))
        except Exception as cause:  # the library raises bare Exception
            raise DataError(f"{path / TOKENIZER} is not a tokenizer: {one_line(cause)}") from None
    elif missing := [name for name in _packages(path) if not _installed(_MODULES[name])]:
        raise DataError(
            f"{path} has no tokenizer.json, and transformers converts the vocabulary that it has with packages that "
            f"are not installed here: pip install {' '.join(missing)}"
        )
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".removesuffix(": ")
    raise DataError(
        f"{path}: transformers cannot load this tokenizer: {reason}; "
        "copy its files again from the checkpoint they belong to, or give another directory with --from DIR"
    ) from None


_MODULES = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf", "tiktoken": "tiktoken"}


def _packages(path: Path) -> tuple[str, ...]:
    """Return the packages that a vocabulary without tokenizer.json is converted with."""
    file = next((path / name for name in VOCABULARIES if name.endswith(".model") and (path / name).is_file()), None)
    if file is None:
        return ()
    with file.open("rb") as opened:
        is_tiktoken = re.match(rb"[A-Za-z0-9+/]+=* \d+\s", opened.read(1000))
    return ("tiktoken",) if is_tiktoken else ("sentencepiece", "protobuf")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _check_fast(loaded: Any, path: Path) -> None:
    if not getattr(loaded, "is_fast", False) or not isinstance(getattr(loaded, "backend_tokenizer", None), Backend):
        raise DataError(
            f"{path}: the tokenizer is a {type(loaded).__name__}, written in Python, which does not say where in a "
            "text its tokens begin; save it once as a tokenizer.json, or give another directory with --from DIR"
        )


def _check_name(name: str, loaded: Any, path: Path, said: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise DataError for a special token that no file defines, unless only the class names it and nothing writes it.

    transformers gives it the next free id: a row of the embedding that nothing ever trained, or none at all.
    """
    content = loaded.special_tokens_map[name]
    files = [file for file in (CONFIG, SPECIAL_TOKENS) if token_content(said[file].get(name)) == content]
    around = loaded.backend_tokenizer.encode("", add_special_tokens=True).tokens
    if not files and name not in ("bos_token", "eos_token") and content not in around:
        return
    where = str(path / files[0]) if files else f"{path}: the class {type(loaded).__name__}"
    id = said["config.json"].get(f"{name}_id")
    known = loaded.convert_ids_to_tokens(id) if isinstance(id, int) and not isinstance(id, bool) else None
    hint = f"config.json says {id}, which is {known!r}" if known else f"set {name} to one that tokenizer.json has"
    raise DataError(f"{where} names {name} {content!r}, which no file of the directory gives an id; {hint}")


def _undefined(named: Mapping[str, str], loaded: Any, path: Path, config: Mapping[str, Any]) -> set[str]:
    """Return the names of the special tokens that no file of the directory gives an id."""
    model = loaded.backend_tokenizer.model
    unsure = {name for name, text in named.items() if model.token_to_id(text) is None}
    if not unsure:
        return unsure
    listed = read_object(path / TOKENIZER).get("added_tokens", [])
    decoder = config.get("added_tokens_decoder", {}).values()
    added = {token_content(token) for token in (*listed, *decoder)} | set(read_object(path / "added_tokens.json"))
    return {name for name in unsure if named[name] not in added}


def token_content(value: Any) -> str | None:
    """Return the text of a token that JSON says as text or as an object with its flags."""
    value = value.get("content") if isinstance(value, Mapping) else value
    return value if isinstance(value, str) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from writing to stderr while it loads: each rank would, and what matters is said by zoo."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


# Reading ------------------------------------------------------------------------------------------


def read_text(path: Path, *, hint: str) -> str:
    """Return a file's text. Raises DataError naming it."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"{path} cannot be read: {reason}; {hint}") from None


def read_object(path: Path) -> dict[str, Any]:
    """Return a file's JSON object, an empty one if there is no such file. Raises DataError naming it."""
    if not path.is_file():
        return {}
    text = read_text(path, hint="copy it again from the checkpoint it belongs to")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value
