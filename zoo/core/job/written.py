"""Settings as people write them, in a YAML file or after `--set`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from zoo.core.errors import UsageError
from zoo.core.job.job import Settings, texts


def read_file(path: Path) -> Settings:
    """Settings of a YAML file, each with its place. Raises UsageError."""
    try:
        text = path.read_text(encoding="utf-8")
        loaded, typed = yaml.safe_load(text), yaml.load(text, yaml.BaseLoader)
    except OSError as error:
        raise UsageError(f"-c {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"-c {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict) or not all(isinstance(part, dict) for part in loaded.values()):
        raise UsageError(f"-c {path}: expected sections of keys, as in a run's config.yaml")
    return {
        (name := f"{section}.{key}"): (_as_typed(name, value, typed[section].get(key)), str(path))
        for section, part in loaded.items()
        for key, value in part.items()
    }


def parse_assignments(assignments: tuple[str, ...]) -> Settings:
    """`--set a.b=v` to settings; the value is read as YAML. Raises UsageError."""
    result = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or "." not in key:
            raise UsageError(f"--set {text}: write --set section.key=value, for example --set optim.lr=1e-4")
        try:
            read, typed = yaml.safe_load(value), yaml.load(value, yaml.BaseLoader)
        except yaml.YAMLError:
            raise UsageError(f"--set {text}: '{value}' is not a YAML value") from None
        name = key.strip()
        result[name] = (_as_typed(name, read, typed), f"--set {text}")
    return result


def _as_typed(key: str, value: Any, typed: Any) -> Any:
    """A text as it was typed: to YAML a directory 20261126_01 is a number without the underscore, and `no` is false."""
    return value if value is None or typed is None or key not in texts() else typed
