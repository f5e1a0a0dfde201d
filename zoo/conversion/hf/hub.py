"""From a hub id to a local directory, by huggingface_hub: its cache, its tokens, its rules for being offline.

What went wrong is told by its kind and status only: the text of an error may quote a header, and with it a token.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from zoo import DataError
from zoo.core.tokenizer.files import TEMPLATES

LOGIN = "hf auth login"
_REPO = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
_HUB_ID = re.compile(rf"({_REPO})(?:@([A-Za-z0-9][A-Za-z0-9_./-]{{0,127}}))?")
_LICENCES = ("license", "licence", "notice", "copying", "use_policy")
_WANTED = (
    *("*.safetensors", "*.json", "*.jinja", "*.model", "tokenizer.model.v*", "merges.txt", "vocab.txt"),
    *("".join(f"[{c}{c.upper()}]" for c in word) + "*" for word in _LICENCES),
)
# Patterns cross folders and know no exception, so: whatever leaves the path of the one folder at some character.
_UNWANTED = (
    *("consolidated*", "adapter_model*", "*.py", "*.bin", "*.pt", "*.pth", "*.pkl", f"{TEMPLATES}/*/*"),
    *(f"{TEMPLATES[:i]}/*" for i in range(len(TEMPLATES))),
    *(f"{TEMPLATES[:i]}[!{c}/]*/*" for i, c in enumerate(TEMPLATES)),
    f"{TEMPLATES}[!/]*/*",
)


def is_hub_id(source: str) -> bool:
    """`owner/name` or `owner/name@revision`, and not a path."""
    return _HUB_ID.fullmatch(source) is not None and ".." not in source


def fetch(hub_id: str) -> Path:
    """Download what is not in the local cache yet; pickles and code are left out. Raises DataError.

    What came over before a download broke off stays in the cache and is not fetched again.
    """
    repo, _, revision = hub_id.partition("@")
    try:
        path = snapshot_download(
            repo, revision=revision or None, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED)
        )
    except RepositoryNotFoundError as error:
        here = "" if isinstance(error, GatedRepoError) else ", and there is no such directory here"
        raise DataError(f"{hub_id}: {hub_reason(error)}{here}") from None
    except (RevisionNotFoundError, HFValidationError) as error:
        raise DataError(f"{hub_id}: {hub_reason(error)}") from None
    except Exception as error:
        named = f"{repo} --revision {revision}" if revision else repo
        raise DataError(
            f"{hub_id} is not whole in the local cache and the hub cannot give it: {hub_reason(error)}; download it "
            f"where there is a network (hf download {named} --local-dir DIR) and give the directory"
        ) from None
    return Path(path)


def hub_reason(error: Exception) -> str:
    """Whatever huggingface_hub raised in a few words, with what to type where that helps."""
    match error:
        case GatedRepoError():
            return f"the hub asks for a licence to be accepted on its page first; then type: {LOGIN}"
        case DisabledRepoError():
            return "the hub has disabled this repository"
        case RepositoryNotFoundError():
            return f"the hub has no such repository, or it is private (type: {LOGIN})"
        case RevisionNotFoundError():
            return "the repository has no such branch, tag or commit; see its page for those it has"
        case HFValidationError():
            return "no valid hub id; it has the form owner/name"
    return _cause(error)


def _cause(error: BaseException) -> str:
    """Why, by the status of the answer in this error or in those that led to it."""
    seen: BaseException | None = error
    for _ in range(5):
        if seen is None:
            break
        if isinstance(seen, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set"
        status = getattr(getattr(seen, "response", None), "status_code", None)
        if isinstance(status, int):
            return _meaning(status)
        seen = seen.__cause__ or seen.__context__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"it cannot be reached from here ({type(error).__name__})"


def _meaning(status: int) -> str:
    meanings = {
        401: f"it answers 401, the token is missing or not valid (type: {LOGIN})",
        403: f"it answers 403, the token may not do this (type: {LOGIN}, with a token that may)",
        404: "it answers 404, there is no such thing",
        409: "it answers 409, somebody else is changing the repository",
        412: "it answers 412, the repository changed meanwhile",
        413: "it answers 413, that is too large",
        429: "it answers 429, too many requests (wait a few minutes)",
    }
    return meanings.get(status, f"it answers {status}")
