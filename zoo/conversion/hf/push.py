"""From a written, verified checkpoint directory to a repository of the hub, in one commit."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

from zoo import DataError, UsageError
from zoo.conversion.hf.hub import LOGIN, hub_reason, is_hub_id
from zoo.core.storage.checksums import NAME as CHECKSUMS
from zoo.core.storage.companions import ADAPTER_CONFIG, is_companion, is_licence

_WEIGHTS = re.compile(r"[\w.-]+\.safetensors(\.index\.json)?", re.ASCII)


def check_push(repo: str) -> None:
    """What can be known of a push before there is anything to push. Raises UsageError or DataError."""
    if not is_hub_id(repo) or "@" in repo:
        raise UsageError(f"--push {repo!r:.120}: no hub id; it has the form owner/name")
    if constants.HF_HUB_OFFLINE:
        raise UsageError("--push needs the hub and HF_HUB_OFFLINE is set; unset it, or export without --push")
    if not get_token():
        raise DataError(f"--push {repo} needs a token of the hub and there is none; type: {LOGIN}")


def push(directory: Path, repo: str, *, private: bool) -> str:
    """Upload a checkpoint directory and return the URL of the commit. Raises DataError, the directory stays as it is.

    The repository is made if there is none. Files it has already stay there, those of the same name are replaced. All
    of it is one commit that comes last, so whatever fails before leaves the repository as it was.
    """
    again = f"{directory} is whole, push it again: hf upload {repo} {directory}{' --private' if private else ''}"
    try:
        return _commit(HfApi(), directory, repo, private=private)
    except DataError as error:
        raise DataError(f"{repo} {error}; {again}") from None
    except Exception as error:
        raise DataError(f"{repo} was not pushed: {hub_reason(error)}; {again}") from None


def _commit(api: HfApi, directory: Path, repo: str, *, private: bool) -> str:
    # The hub has checksums of its own, which follow what is changed there.
    found = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != CHECKSUMS)
    files = {path.relative_to(directory).as_posix(): path for path in found}
    api.create_repo(repo, private=private or None, exist_ok=True)
    parent = _checked_parent(api, repo, files, private=private)
    commit = api.create_commit(
        repo,
        [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()],
        commit_message="Add a checkpoint written by zoo",
        parent_commit=parent,
    )
    _check_arrived(api, repo, files, revision=commit.oid)
    url = str(commit.commit_url)
    return url if url.isprintable() else f"{api.endpoint}/{repo}"


def _checked_parent(api: HfApi, repo: str, names: Collection[str], *, private: bool) -> str | None:
    """The commit to build on, if what the repository has may stay beside the new files. Raises DataError."""
    info = api.model_info(repo)
    there = [file.rfilename for file in info.siblings or ()]
    others = [name for name in there if name not in names]
    if weights := [name for name in others if _WEIGHTS.fullmatch(name)]:
        raise DataError(
            f"already has {weights[0]}, which would stay beside the new weights, and loaders disagree about which "
            f"count; delete it there first or take another repository"
        )
    if winning := [name for name in others if _is_winning(name)]:
        raise DataError(
            f"already has {winning[0]}, which would stay and which loaders prefer to what the new files say; delete "
            f"it there first or take another repository"
        )
    if private and info.private is False:
        raise DataError(
            "is there already and public, and --private was asked for; make it private on its page or take another"
        )
    return info.sha


def _is_winning(name: str) -> bool:
    """Whether a file that is no weight changes what loaders make of a checkpoint beside it."""
    return name == ADAPTER_CONFIG or (is_companion(name) and not is_licence(name))


def _check_arrived(api: HfApi, repo: str, files: Mapping[str, Path], *, revision: str) -> None:
    """Compare names and sizes: the hub leaves out, and does not say so, what the repository's .gitignore names."""
    there = {
        file.path: getattr(file, "size", None) for file in api.get_paths_info(repo, list(files), revision=revision)
    }
    missing = [name for name, path in files.items() if there.get(name) != path.stat().st_size]
    if missing:
        raise DataError(f"did not keep {missing[0]} as it is here; see whether its .gitignore names it")
