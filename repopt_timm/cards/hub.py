"""Repositories on the Hugging Face Hub: files down, folders up."""

import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from huggingface_hub import _CACHED_NO_EXIST, HfApi, constants, hf_hub_download, scan_cache_dir, try_to_load_from_cache
from huggingface_hub.errors import (
    CacheNotFound,
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import get_token

from ..errors import scrub
from .card import CARD_FILE, SCALES_FILE

HUB_PREFIX = 'hf-hub:'

_ATTEMPTS = 12


def _scrub_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = scrub(record.getMessage()), ()
    return True


# When the client tries again, it logs the address, which holds the password of HF_ENDPOINT.
for handler in logging.getLogger('huggingface_hub').handlers:
    handler.addFilter(_scrub_record)


class HubError(OSError):
    """What the Hub's client said, with the repository and file that it is about, and without tokens."""


class HubFileNotFoundError(HubError):
    """The repository is there, and the file is not in it."""


class HubSource(NamedTuple):
    """A repository on the Hub, at its main branch unless a branch, tag or commit is named."""

    repo_id: str
    revision: str | None = None

    def __str__(self) -> str:
        return HUB_PREFIX + self.repo_id + (f'@{self.revision}' if self.revision else '')


def parse_hub_source(text: str) -> HubSource:
    """Parses `hf-hub:user/repo[@revision]`; whether there is such a repository turns out on its use."""
    repo_id, at, revision = text.removeprefix(HUB_PREFIX).partition('@')
    # Less than git allows: nothing that could lead out of the cache.
    if at and (not re.fullmatch(r'\w[\w.+#/-]*', revision) or '..' in revision):
        raise ValueError(f"{text}: '{revision}' is not the name of a revision, expected a branch, tag or commit.")
    return HubSource(repo_id, revision or None)


def download(
    repo_id: str,
    file: str,
    revision: str | None = None,
    cache_dir: Any = None,
    token: str | bool | None = None,
) -> Path:
    """Downloads a file of a model repository into the cache, unless it is there already, and returns its path."""
    with _explained(f'{HubSource(repo_id, revision)}, file {file}', token):
        # The client knows that the file is missing, but reports it as unknown while it is offline.
        if constants.HF_HUB_OFFLINE and try_to_load_from_cache(repo_id, file, cache_dir, revision) is _CACHED_NO_EXIST:
            raise EntryNotFoundError('The repository has no such file.')
        return Path(hf_hub_download(repo_id, file, revision=revision, cache_dir=cache_dir, token=token))


def cached_files(file: str) -> list[tuple[HubSource, Path]]:
    """Returns the sources and paths under which model repositories have a file in the cache."""
    try:
        repos = sorted(scan_cache_dir().repos, key=lambda each: each.repo_id)
    except CacheNotFound:
        return []
    return [
        (HubSource(repo.repo_id, None if name == 'main' else name), each.file_path)
        for repo in repos
        if repo.repo_type == 'model'
        for revision in repo.revisions
        for name in sorted(revision.refs) or [revision.commit_hash]
        for each in revision.files
        if each.file_name == file
    ]


def push_folder(
    repo_id: str,
    write: Callable[[Path, str, frozenset[str], bool], None],
    message: str,
    scales_file: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> str:
    """Uploads what `write` makes in one commit, and returns its address; see `push_to_hub` and `write_card`.

    If somebody else commits to the branch meanwhile, their card is read and `write` called again: nothing is lost.
    """
    api = HfApi(token=token)
    with _explained(str(HubSource(repo_id, revision)), token):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith('refs/'):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        # If several pushes meet, one gets through each time; the others read what it wrote, and try again.
        attempt = 0
        while True:
            attempt += 1
            try:
                with TemporaryDirectory(prefix='repopt-timm-') as folder:
                    info = api.model_info(repo_id, revision=revision)
                    files = frozenset(each.rfilename for each in info.siblings or ())
                    for name in files & {CARD_FILE, SCALES_FILE}:
                        api.hf_hub_download(repo_id, name, revision=info.sha, local_dir=folder)
                    write(Path(folder), repo_id, files, scales_file)
                    # The Hub refuses a commit (412) if the branch has moved since.
                    commit = api.upload_folder(
                        repo_id=repo_id,
                        folder_path=folder,
                        revision=revision,
                        create_pr=create_pr,
                        commit_message=message,
                        parent_commit=info.sha,
                    )
                return commit.pr_url or commit.commit_url
            except HfHubHTTPError as error:
                status = error.response.status_code
                if status == 413 and not scales_file:
                    # The card is too large.
                    scales_file = True
                elif status not in (409, 412) or attempt == _ATTEMPTS:
                    raise
                else:
                    time.sleep(random.uniform(0, min(8, 0.25 * 2**attempt)))


@contextmanager
def _explained(what: str, token: str | bool | None) -> Iterator[None]:
    """Turns errors of the client into a HubError of one line; a token may be in their text, or in their causes."""
    try:
        yield
    except (EntryNotFoundError, HTTPError, OfflineModeIsEnabled, RuntimeError) as error:
        # The client calls any answer other than a redirect a failed connection.
        hidden = isinstance(error.__cause__, HTTPError) and not isinstance(error, HTTPError)
        text = ' '.join(str(error.__cause__ if hidden else error).split()) or type(error).__name__
        missing = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if constants.HF_HUB_OFFLINE and not missing:
            text = 'HF_HUB_OFFLINE forbids asking the Hub: unset it, or download the file before.'
        text = scrub(f'{what}: {text}', token if isinstance(token, str) else get_token())
        raise (HubFileNotFoundError if missing else HubError)(text) from None
