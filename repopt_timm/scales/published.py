"""Scales that others have published as files: the table `published_scales.csv`, and their download into the cache."""

import csv
import hashlib
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from huggingface_hub import constants

from ..errors import reason_of
from ..names import ModelName
from ..reparam import Scales
from .scale_files import read_scale_file

PUBLISHED = 'published'
"""The tag of published scales; alone it means the scales published for the model at hand."""

ADDRESS = 'https://raw.githubusercontent.com'
"""Where files of GitHub's repositories are: <address>/<repository>/<commit>/<file>."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublishedScales:
    """A row of the table: a file at a commit of a repository on GitHub; `name` is `<target model>.published`."""

    name: str
    file: str
    repository: str
    commit: str
    sha256: str
    license: str
    dataset: str
    epochs: str

    @property
    def network(self) -> str:
        """Name of the network, as `Scales.architecture` has it."""
        return ModelName.parse(self.name).network

    @property
    def path(self) -> Path:
        """Its file in the assets cache of huggingface_hub."""
        return Path(constants.HF_ASSETS_CACHE, 'repopt_timm', self.repository, self.commit, self.file)

    @property
    def is_cached(self) -> bool:
        """Whether it is in the cache, whole and unchanged."""
        return self.path.is_file() and hashlib.sha256(self.path.read_bytes()).hexdigest() == self.sha256


@cache
def published_table() -> dict[str, PublishedScales]:
    """Returns all published scales, by name."""
    with open(Path(__file__).with_name('published_scales.csv'), encoding='utf-8', newline='') as file:
        return {row['name']: PublishedScales(**row) for row in csv.DictReader(file)}


def find_published(model_name: str) -> PublishedScales | None:
    """Returns the scales that are published for the network of a model, whatever its kind and tag."""
    network = ModelName.parse(model_name).network
    return next((row for row in published_table().values() if row.network == network), None)


def read_published(model_name: str) -> Scales:
    """Reads the scales that are published for the network of a model, from the cache or else from GitHub."""
    row = find_published(model_name)
    if row is None:
        raise ValueError(f"No scales are published for '{model_name}', expected one of {', '.join(published_table())}.")
    if not row.is_cached:
        _logger.info(f'{row.name}: downloading {row.file} of {row.repository} ({row.license.upper()} licence)')
        row.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if constants.HF_HUB_OFFLINE:
                raise OSError('HF_HUB_OFFLINE is set')
            url = f'{ADDRESS}/{row.repository}/{row.commit}/{row.file}'
            torch.hub.download_url_to_file(url, str(row.path), row.sha256, progress=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise OSError(f'{row.name} is not in the cache, and its download failed: {reason_of(error)}.') from None
    provenance = {
        'method': "hyper-search of the method's authors",
        'dataset': row.dataset,
        'epochs': int(row.epochs),
        'source': f'https://github.com/{row.repository}/blob/{row.commit}/{row.file}',
        'license': row.license,
        'sha256': row.sha256,
    }
    return read_scale_file(row.path, row.network).renamed(row.network).with_provenance(provenance, row.name)
