"""Compare zoo's tokens with those of the installed transformers over many tokenizer directories.

    python tools/compare_tokenizers.py [--count 80]

Directories are drawn as in tools/drawn_tokenizers.py, and made of real vocabularies where packages that ship them
are installed: mistral-common (Mistral, Mixtral; with sentencepiece and protobuf) and llama-models (Llama 3; with
tiktoken). Each is read by AutoTokenizer and by zoo; 20 texts and 20 conversations have to be the same ids. Run it with
another transformers by installing that. Ends with status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from tools.drawn_tokenizers import TEMPLATES, Drawn, differences, draw, refused
from tools.made_tokenizer import MISTRAL

LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=80, help="directories to draw")
    count = parser.parse_args().count
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    started, total, differing, not_loaded = time.monotonic(), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for drawn in directories(Path(folder), count):
            found = list(differences(drawn, lambda path=drawn.path: loaded(path)))
            total, differing, not_loaded = total + 1, differing + bool(found), not_loaded + refused(drawn)
            for line in found[:3]:
                say(f"{drawn.choices}\n    {line[:400]}")
    took = time.monotonic() - started
    say(
        f"transformers {transformers.__version__}: {total} directories, {differing} differ, "
        f"{not_loaded} refused by both or for a token without an id, {took:.0f} s"
    )
    return int(differing > 0)


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def loaded(path: Path) -> Any:
    """Load a directory as transformers does, without asking anybody and without the classes of mistral-common."""
    options = {"mistral_format": False} if transformers.__version__ >= "5" else {}
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True, **options)


def directories(folder: Path, count: int) -> Iterator[Drawn]:
    """Yield drawn directories, then real ones."""
    for seed in range(count):
        yield draw(seed, folder / f"drawn-{seed}")
    if data := data_of("mistral_common", "data"):
        for file in sorted(data.glob("*.model.v[13]")):
            yield from mistral(file, folder)
        for file in sorted(data.glob("tekken_2407*.json")):
            path = written(folder / file.stem, {"chat_template": MISTRAL}, {"model_type": "mistral"})
            (path / "tekken.json").write_bytes(file.read_bytes())
            yield real(path)
    if data := data_of("llama_models", "llama3"):
        yield from llama3(data / "tokenizer.model", folder)


def data_of(package: str, name: str) -> Path | None:
    """Return a folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        say(f"{package} is not installed: its vocabularies are left out")
        return None
    return Path(spec.submodule_search_locations[0]) / name


def mistral(file: Path, folder: Path) -> Iterator[Drawn]:
    """Yield a SentencePiece vocabulary alone, under several classes, and the tokenizer.json that is made of it."""
    for name, model in (("LlamaTokenizer", "llama"), ("LlamaTokenizerFast", "mixtral"), (None, "mixtral")):
        config = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        config |= {"chat_template": MISTRAL} | ({"tokenizer_class": name} if name else {})
        path = written(folder / f"{file.name}-{name}-{model}", config, {"model_type": model})
        (path / "tokenizer.model").write_bytes(file.read_bytes())
        yield real(path)
        if name == "LlamaTokenizer":
            converted = path.with_name(f"{path.name}-converted")
            loaded(path).save_pretrained(converted)
            (converted / "config.json").write_text(json.dumps({"model_type": model}))
            yield real(converted)


def llama3(file: Path, folder: Path) -> Iterator[Drawn]:
    """Yield Llama 3's tiktoken vocabulary alone, and the tokenizer.json that is made of it."""
    config = {"bos_token": LLAMA3_SPECIAL[0], "eos_token": LLAMA3_SPECIAL[1], "chat_template": TEMPLATES["llama3"]}
    backend = _converted(file)
    bos = LLAMA3_SPECIAL[0]
    backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
    for name in ("PreTrainedTokenizerFast", "LlamaTokenizerFast", "LlamaTokenizer", None):
        named = config | ({"tokenizer_class": name} if name else {})
        path = written(folder / f"llama3-{name}", named, {"model_type": "llama"})
        backend.save(str(path / "tokenizer.json"))
        yield real(path)
    decoder = {128000 + number: {"content": text, "special": True} for number, text in enumerate(LLAMA3_SPECIAL)}
    named = {**config, "tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": decoder}
    path = written(folder / "llama3-tiktoken", named, {"model_type": "llama"})
    (path / "tokenizer.model").write_bytes(file.read_bytes())
    yield real(path)


def _converted(file: Path) -> Backend:
    """Return the tokenizer of a tiktoken file; its split pattern is the converter's default, which is Llama 3's."""
    name = "extra_special_tokens" if transformers.__version__ >= "5" else "additional_special_tokens"
    converted: Backend = TikTokenConverter(str(file), **{name: LLAMA3_SPECIAL}).converted()
    return converted


def written(path: Path, config: dict[str, Any], model: dict[str, Any]) -> Path:
    path.mkdir()
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "config.json").write_text(json.dumps(model))
    return path


def real(path: Path) -> Drawn:
    return Drawn(path, {"directory": path.name}, {"<s>", "</s>", "<unk>", *LLAMA3_SPECIAL})


if __name__ == "__main__":
    sys.exit(main())
