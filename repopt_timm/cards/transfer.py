"""Repositories on the Hugging Face Hub: files down, folders up, and one kind of error for whatever goes wrong."""

import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from huggingface_hub import _CACHED_NO_EXIST, HfApi, constants, hf_hub_download, scan_cache_dir, try_to_load_from_cache
from huggingface_hub.errors import (
    CacheNotFound,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_token, validate_repo_id

from ..errors import naming, reason_of
from ..files import replacing
from ..tokens import scrub
from .document import CARD_FILE, read_metadata
from .format import METADATA_KEY, SCALES_FILE, has_scales_file

__all__ = [
    'HUB_PREFIX',
    'HubError',
    'HubFileNotFoundError',
    'HubSource',
    'cached_files',
    'download',
    'parse_hub_source',
    'push_folder',
]

HUB_PREFIX = 'hf-hub:'

# What git allows in the name of a branch or tag, less what could lead out of the cache.
_REVISION = re.compile(r'\w[\w.+#/-]*')

# Of several pushes that meet, one gets through each time; the others read what it wrote, and try again.
_ATTEMPTS = 12
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 8.0
_MOVED = (409, 412)


class HubError(OSError):
    """Something on the Hub is missing, closed or out of reach; the text names the repository and the next step.

    Attributes:
        status: The HTTP status of the answer, if there was one.
    """

    status: int | None = None


class HubFileNotFoundError(HubError):
    """The repository is there, and the file is not in it."""


class HubSource(NamedTuple):
    """A repository on the Hub, at a branch, tag or commit; at its main branch without one."""

    repo_id: str
    revision: str | None = None

    def __str__(self) -> str:
        return HUB_PREFIX + self.repo_id + (f'@{self.revision}' if self.revision else '')


def parse_hub_source(text: str) -> HubSource:
    """Parses `hf-hub:user/repo[@revision]`.

    Raises:
        ValueError: If it is not of this form; names what is wrong with it.
    """
    if not text.startswith(HUB_PREFIX):
        raise ValueError(
            f"'{text}' is not a source on the Hub, expected {HUB_PREFIX}user/repo or {HUB_PREFIX}user/repo@revision."
        )
    repo_id, at, revision = text.removeprefix(HUB_PREFIX).partition('@')
    if at and not revision:
        raise ValueError(f"'{text}' names no revision after the '@': leave it out, or add a branch, tag or commit.")
    return check_source(repo_id, revision or None)


def check_source(repo_id: str, revision: str | None = None) -> HubSource:
    """Checks the names of a repository and a revision.

    Raises:
        ValueError: If one of them is not a valid name.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"'{repo_id}' is not the name of a repository on the Hub, such as user/repo: {error}"
        ) from None
    if revision is not None and (not _REVISION.fullmatch(revision) or '..' in revision):
        raise ValueError(f"{repo_id}: '{revision}' is not the name of a revision, expected a branch, tag or commit.")
    return HubSource(repo_id, revision)


def download(
    repo_id: str,
    file: str,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    token: str | bool | None = None,
) -> Path:
    """Downloads a file of a model repository into the cache, unless it is there already.

    Args:
        repo_id: Name of the repository, `user/repo`.
        file: Name of the file in it.
        revision: Branch, tag or commit.
        cache_dir: Defaults to the client's cache.
        token: Defaults to the token of `hf auth login`.

    Returns:
        Where it is in the cache.

    Raises:
        ValueError: If a name is not that of a repository or revision.
        HubFileNotFoundError: If the repository has no such file.
        HubError: If the file cannot be downloaded for another reason.
    """
    source = check_source(repo_id, revision)
    cache = None if cache_dir is None else os.fspath(cache_dir)
    if constants.HF_HUB_OFFLINE and try_to_load_from_cache(repo_id, file, cache, revision) is _CACHED_NO_EXIST:
        # The client knows that the file is missing, but reports it as unknown while it is offline.
        raise HubFileNotFoundError(_no_such_file(source, file))
    with _clear_errors(source, file, token):
        return Path(hf_hub_download(repo_id, file, revision=revision, cache_dir=cache, token=token))


def cached_files(file: str) -> list[tuple[HubSource, Path]]:
    """Returns where a file is in the cache: a source and a path for each revision of a model repository that has it."""
    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    found = []
    for repo in sorted(repos, key=lambda each: each.repo_id):
        for revision in repo.revisions if repo.repo_type == 'model' else ():
            names = sorted(revision.refs) or [revision.commit_hash]
            paths = [each.file_path for each in revision.files if each.file_name == file]
            found += [
                (HubSource(repo.repo_id, None if name == 'main' else name), path) for name in names for path in paths
            ]
    return found


def push_folder(
    repo_id: str,
    write: Callable[[Path, str, frozenset[str], bool], None],
    message: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> str:
    """Writes files into a folder and uploads them in one commit; the repository and the branch are made if need be.

    If somebody else commits to the branch meanwhile, their card is read and `write` called again: nothing is lost.

    Args:
        repo_id: Name of the repository, `user/repo`, or `repo` for one of the token's owner.
        write: Called with a folder that has the repository's card, if there is one, with the repository's full name,
            with the names of its files, and with whether the Hub refused what it wrote before as too large; writes
            what is to be uploaded into the folder. Called again for each attempt.
        message: Title of the commit.
        private: Whether a new repository is private. Defaults to the owner's setting.
        revision: Branch to commit to.
        create_pr: Open a pull request instead of changing the branch.
        token: Defaults to the token of `hf auth login`.

    Returns:
        Address of the commit or pull request.

    Raises:
        ValueError: If a name is not that of a repository or revision.
        HubError: If the repository cannot be written to.
    """
    source = check_source(repo_id, revision)
    api = HfApi(token=token)
    with _clear_errors(source, None, token):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith('refs/'):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    source = HubSource(repo_id, revision)
    for attempt in range(_ATTEMPTS - 1):
        try:
            return _commit_if_taken(api, source, write, message, create_pr)
        except HubError as error:
            if error.status not in _MOVED:
                raise
        time.sleep(random.uniform(0, min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt)))
    return _commit_if_taken(api, source, write, message, create_pr)


def _commit_if_taken(
    api: HfApi,
    source: HubSource,
    write: Callable[[Path, str, frozenset[str], bool], None],
    message: str,
    create_pr: bool,
) -> str:
    """Makes one commit, with a smaller card if the Hub refuses the first as too large (413)."""
    try:
        return _commit(api, source, write, message, create_pr)
    except HubError as error:
        if error.status != 413:
            raise
    return _commit(api, source, write, message, create_pr, too_large=True)


def _commit(
    api: HfApi,
    source: HubSource,
    write: Callable[[Path, str, frozenset[str], bool], None],
    message: str,
    create_pr: bool,
    too_large: bool = False,
) -> str:
    """Makes one commit on what the branch is now; the Hub refuses it (412) if the branch moves meanwhile."""
    repo_id, revision = source
    with TemporaryDirectory(prefix='repopt-timm-') as name:
        folder = Path(name)
        with _clear_errors(source, None, api.token):
            parent = api.repo_info(repo_id, revision=revision).sha
            files = frozenset(api.list_repo_files(repo_id, revision=parent))
        if CARD_FILE in files:
            with TemporaryDirectory(prefix='repopt-timm-') as cache, replacing(folder / CARD_FILE) as card:
                card.write_bytes(download(repo_id, CARD_FILE, parent, cache, api.token).read_bytes())
            if has_scales_file(read_metadata(folder / CARD_FILE, str(source)).get(METADATA_KEY)):
                with TemporaryDirectory(prefix='repopt-timm-') as cache, replacing(folder / SCALES_FILE) as vectors:
                    vectors.write_bytes(download(repo_id, SCALES_FILE, parent, cache, api.token).read_bytes())
        with naming(folder, source):
            write(folder, repo_id, files, too_large)
        with _clear_errors(source, None, api.token, folder / CARD_FILE):
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                create_pr=create_pr,
                commit_message=message,
                parent_commit=parent,
            )
    return commit.pr_url or commit.commit_url


@contextmanager
def _clear_errors(
    source: HubSource, file: str | None, token: str | bool | None, card: Path | None = None
) -> Iterator[None]:
    kind, status = HubError, None
    try:
        yield
    except (EntryNotFoundError, HTTPError, OfflineModeIsEnabled, ConnectionError, TimeoutError, RuntimeError) as error:
        if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
            # The client calls any answer other than a redirect a failed connection.
            error = error.__cause__
        text, status = _explain(error, source, file, card), _status(error)
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            kind = HubFileNotFoundError
    except OSError as error:
        # The client says so when fewer bytes arrive than were announced; other such errors are about the local disk.
        if 'Consistency check failed' not in str(error):
            raise
        text = _unreachable(source, file, error)
    else:
        return
    # Without the client's own error as a cause: its text, and its own causes, may show a token.
    raised = kind(scrub(text, token, get_token()))
    raised.status = status
    raise raised from None


def _status(error: Exception) -> int | None:
    response = getattr(error, 'response', None)
    return None if response is None else response.status_code


def _explain(error: Exception, source: HubSource, file: str | None, card: Path | None) -> str:
    wanted = _wanted(source, file)
    if isinstance(error, RevisionNotFoundError):
        return (
            f'{wanted}: the repository has no such revision. Look at its branches and tags, or leave the revision out.'
        )
    if isinstance(error, GatedRepoError):
        return (
            f'{wanted}: the repository is gated, and this token has no access to it. Ask for access on '
            f'{constants.ENDPOINT}/{source.repo_id}, and log in with `hf auth login` or set HF_TOKEN.'
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f'{wanted}: there is no such repository, or it is private and this token may not see it. Check the name; '
            f'for a private or gated one log in with `hf auth login` or set HF_TOKEN.'
        )
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return (
            _offline(source, file) if constants.HF_HUB_OFFLINE else _unreachable(source, file, error.__cause__ or error)
        )
    if isinstance(error, EntryNotFoundError):
        return _no_such_file(source, file)
    status = _status(error)
    if status is not None:
        return f'{wanted}: {_explain_status(status, error, source, file, card)}'
    return _unreachable(source, file, error)


def _explain_status(status: int, error: Exception, source: HubSource, file: str | None, card: Path | None) -> str:
    if status == 401:
        return 'the Hub does not accept the token (401). Log in again with `hf auth login` or set HF_TOKEN.'
    if status == 403 and file is not None:
        return (
            f'this token may not read it (403). Use one with read access to {source.repo_id}; a gated repository needs '
            f'your consent on {constants.ENDPOINT}/{source.repo_id} first.'
        )
    if status == 403:
        return (
            f'this token may not do that (403). Use one with write access to {source.repo_id}, push to a repository '
            f'of your own, or open a pull request (--create-pr, create_pr=True).'
        )
    if status in _MOVED:
        return (
            f'others went on changing the branch ({status}): {_ATTEMPTS} attempts to add to it came too late. Nothing '
            f'was changed; push again when they have finished, or to a branch of your own (--revision).'
        )
    if status == 413 and card is not None and card.is_file():
        return (
            f'the Hub refuses the card {CARD_FILE} of {card.stat().st_size} bytes as too large (413). Shorten its '
            f'text, or its provenance.'
        )
    if status == 429:
        return f'the Hub takes no more requests from you for now (429): {reason_of(error)}. Wait, then try again.'
    if status >= 500:
        return f'the Hub answers {status}: {reason_of(error)}. That is a problem of the Hub: try again later.'
    return f'the Hub refuses that ({status}): {reason_of(error)}. Mend what it names, then try again.'


def _offline(source: HubSource, file: str | None) -> str:
    revision = f' --revision {source.revision}' if source.revision else ''
    command = f'`hf download {source.repo_id}{" " + file if file else ""}{revision}`'
    return (
        f'{_wanted(source, file)} is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE=1 forbids asking '
        f'the Hub. Run {command} once with a network, or unset HF_HUB_OFFLINE.'
    )


def _no_such_file(source: HubSource, file: str | None) -> str:
    return f'{_wanted(source, file)}: the repository has no such file. Check the repository and its revision.'


def _unreachable(source: HubSource, file: str | None, error: BaseException) -> str:
    return (
        f'{_wanted(source, file)}: the connection to {constants.ENDPOINT} failed: {reason_of(error)}. No half file was '
        f'kept; check the network (and HF_ENDPOINT), then try again.'
    )


def _wanted(source: HubSource, file: str | None) -> str:
    return f'{source}, file {file}' if file else str(source)
