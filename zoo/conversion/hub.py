"""From a hub id to a local directory, by huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from zoo.core.errors import DataError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "tokenizer.model", "*.jinja", "LICENSE*")
_UNWANTED = ("original/*", "*/*", "consolidated*")


def is_hub_id(source: str) -> bool:
    """`owner/name`, and not a path."""
    return _HUB_ID.fullmatch(source) is not None and ".." not in source


def fetch(hub_id: str) -> Path:
    """Download what is not in the local cache yet; pickles and code are left out. Raises DataError."""
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED)))
    except GatedRepoError:
        raise DataError(
            f"{hub_id}: the hub asks for a licence to be accepted on its page first; then type: hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise DataError(
            f"{hub_id}: the hub has no such repository, or it is private (type: hf auth login), and there is no such "
            f"directory here"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"it answers {status}" if status else "it cannot be reached from here"
        raise DataError(
            f"{hub_id} is not whole in the local cache and the hub cannot give it: {reason}; download it where "
            f"there is a network (hf download {hub_id} --local-dir DIR) and give the directory"
        ) from None
