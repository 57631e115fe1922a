"""Scales that others have published as files: a table of them, and their way into the cache.

The table is `published_scales.csv`. Files are downloaded once from the commit that it names, checked against its
sha256, and kept where the Hub's client keeps what libraries download, under `HF_HOME`.
"""

import csv
import hashlib
import logging
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import cached_assets_path, constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.file_download import http_get

from ..errors import reason_of
from ..files import replacing
from ..names import ModelName
from ..reparam import Scales
from .scale_files import read_scale_file

__all__ = ['PUBLISHED', 'PublishedScales', 'find_published', 'published_table', 'read_published']

PUBLISHED = 'published'
"""The tag of these scales, and what means those of a model at hand."""

_TABLE = Path(__file__).with_name('published_scales.csv')
_GITHUB = 'https://github.com'
# Where files of GitHub's repositories are: <address>/<repository>/<commit>/<file>. Tests and mirrors set another.
_ADDRESS_VARIABLE = 'REPOPT_TIMM_PUBLISHED_URL'
_ADDRESS = 'https://raw.githubusercontent.com'

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublishedScales:
    """A row of the table.

    Attributes:
        name: `<target model>.published`.
        file: Path in the repository.
        repository: Repository on GitHub, `owner/name`.
        commit: Its commit.
        sha256: Digest of the file.
        license: Of the file, as an SPDX identifier in lower case.
        dataset: What the scales were searched on.
        epochs: For how long.
    """

    name: str
    file: str
    repository: str
    commit: str
    sha256: str
    license: str
    dataset: str
    epochs: str

    @property
    def page(self) -> str:
        """Address of the file, for people."""
        return f'{_GITHUB}/{self.repository}/blob/{self.commit}/{self.file}'

    @property
    def path(self) -> Path:
        """Where it is in the cache once it was downloaded."""
        return cached_assets_path('repopt_timm', self.repository, self.commit) / self.file

    @property
    def is_cached(self) -> bool:
        """Whether it is in the cache, whole and unchanged."""
        try:
            return self.path.is_file() and _digest(self.path) == self.sha256
        except OSError:
            # `cached_assets_path` makes folders.
            return False

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the scales come from, for a card."""
        return {
            'method': "hyper-search of the method's authors",
            'dataset': self.dataset,
            'epochs': int(self.epochs),
            'source': self.page,
            'license': self.license,
            'sha256': self.sha256,
        }


@cache
def published_table() -> dict[str, PublishedScales]:
    """Returns all published scales, by name."""
    with open(_TABLE, encoding='utf-8', newline='') as file:
        return {row['name']: PublishedScales(**row) for row in csv.DictReader(file)}


def find_published(model_name: str) -> PublishedScales | None:
    """Returns the scales that are published for a network.

    Args:
        model_name: Name of a network, or of a model of any kind and tag of it.
    """
    network = ModelName.parse(model_name).network
    return next((row for row in published_table().values() if ModelName.parse(row.name).network == network), None)


def read_published(model_name: str) -> Scales:
    """Reads the scales that are published for a network, which are downloaded unless they are in the cache.

    Args:
        model_name: Name of a network, or of a model of any kind and tag of it.

    Returns:
        The scales, with licence and source in their provenance.

    Raises:
        OSError: If they can be neither found in the cache nor downloaded.
        ValueError: If none are published for it, or the file that came is another.
    """
    row = find_published(model_name)
    if row is None:
        raise ValueError(f"No scales are published for '{model_name}', expected one of {', '.join(published_table())}.")
    if not row.is_cached:
        _download(row)
    network = ModelName.parse(row.name).network
    scales = read_scale_file(row.path, network).with_provenance(row.provenance, row.name)
    return scales if scales.architecture else scales.renamed(network)


def _download(row: PublishedScales) -> None:
    url = f'{os.environ.get(_ADDRESS_VARIABLE, _ADDRESS).rstrip("/")}/{row.repository}/{row.commit}/{row.file}'
    if constants.HF_HUB_OFFLINE:
        raise OSError(
            f'{row.name}: {row.file} is not in the cache {row.path.parent}, and HF_HUB_OFFLINE=1 forbids to download '
            f'it. Run `repopt-timm scales show {row.name}` once with a network, or unset HF_HUB_OFFLINE.'
        )
    _logger.info(f'{row.name}: downloading {row.file} ({row.license.upper()} licence) from {row.page}')
    with replacing(row.path) as temporary:
        with open(temporary, 'wb') as file:
            try:
                http_get(url, file)
            except HfHubHTTPError as error:
                raise OSError(
                    f'{row.name}: {url} answers {error.response.status_code}. Check {_ADDRESS_VARIABLE} if it is set, '
                    f'or get {row.page} yourself and name the file.'
                ) from None
            except (HTTPError, ConnectionError, TimeoutError, OSError) as error:
                raise OSError(
                    f'{row.name}: the download of {url} failed: {reason_of(error)}. No half file was kept; check the '
                    f'network, then try again.'
                ) from None
        found = _digest(temporary)
        if found != row.sha256:
            raise ValueError(
                f'{row.name}: {url} is another file than expected: its sha256 is {found}, expected {row.sha256}. It '
                f'was not kept; check {_ADDRESS_VARIABLE} if it is set, and the network for a proxy.'
            )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
