"""Searched scales: the one type that holds them, and the files they come from."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..architectures import ARCHITECTURES, DEFAULT_STRIDES, Architecture, infer_architecture
from ..cards.format import CARD_FILE, CardEntry, read_entry
from ..cards.transfer import check_source, download, push_folder
from ..cards.writing import write_card
from ..checkpoints.read import read_checkpoint, select_state_dict
from ..checkpoints.reference_layout import scale_name
from ..files import replacing
from ..reparam import CSLAConv2d, carried_scales
from ..reparam.vectors import check_vectors, fingerprint

__all__ = ['Scales']

_FORMAT = 'repopt_timm.scales'
_FORMAT_VERSION = 1
# Key of a scale, or of the identity's operator, in a state dict of ours: module, branch.
_OWN_KEY = re.compile(r'(.+)\.branches\.(?:([^.]+)\.scale|(identity)\.weight)')


class Scales(Mapping[str, Mapping[str, Tensor]]):
    """The scales of a RepOpt network: convolution's module name to {branch name: float32 vector of shape (O,)}.

    Immutable: what is handed out are copies. Modules come in the order of the network. Two are equal when
    architecture, strides, names and float32 bits are.

    Args:
        architecture: Name of the target model, such as `repopt_vgg_b1`; any name for a model of your own.
        modules: Module name to branch name to vector.
        strides: Strides of stem and stages that the scales were searched with.
        provenance: Where they come from: JSON-serializable, no part of the identity.
        source: File or repository that they were read from, for errors.

    Raises:
        ValueError: If there are no scales, a vector is no finite float vector, or, for a known architecture, a
            convolution is missing, left over or has other branches or another width.

    Example:
        >>> scales = Scales.initial('repopt_vgg_a0')
        >>> scales['stem.conv']['1x1'].shape
        torch.Size([48])
    """

    def __init__(
        self,
        architecture: str,
        modules: Mapping[str, Mapping[str, Tensor]],
        strides: Sequence[int] = DEFAULT_STRIDES,
        provenance: Mapping[str, Any] | None = None,
        source: str = '',
    ):
        if not modules:
            raise ValueError(f'{source or architecture}: there are no scales in it.')
        self._architecture = architecture
        self._strides = tuple(int(stride) for stride in strides)
        self._provenance = json.dumps(dict(provenance or {}))
        self._source = source
        self._modules = {
            module: {
                branch: vector.detach().to('cpu', torch.float32).clone() for branch, vector in sorted(vectors.items())
            }
            for module, vectors in sorted(modules.items(), key=lambda item: _depth_key(item[0]))
        }
        for module, vectors in self._modules.items():
            check_vectors(module, vectors, source=source)
        if architecture in ARCHITECTURES:
            self._check_layout(ARCHITECTURES[architecture])
        identity = {'architecture': self._architecture, 'strides': self._strides}
        self._fingerprint = fingerprint(self._modules, identity)

    def _check_layout(self, architecture: Architecture) -> None:
        specs = {spec.name: spec for spec in architecture.convs(self._strides)}
        source = self._source or 'The scales'
        for name in [*specs, *self._modules]:
            if name not in self._modules:
                raise ValueError(f"{source}: module '{name}' of {self._architecture} has no scales. Search it anew.")
            if name not in specs:
                raise ValueError(
                    f"{source}: there are scales for a module '{name}', but {self._architecture} has no such one."
                )
            spec = specs[name]
            check_vectors(name, self._modules[name], spec.out_channels, spec.branches, source)

    @property
    def architecture(self) -> str:
        """Name of the target model."""
        return self._architecture

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the stem and of the stages."""
        return self._strides

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the scales come from: dataset, epochs, accuracy, seed, versions, date, as far as known."""
        return json.loads(self._provenance)

    @property
    def source(self) -> str:
        """File or repository that the scales were read from, if any."""
        return self._source

    @property
    def fingerprint(self) -> str:
        """The sha256 of architecture, strides, names and float32 bits, in 64 hexadecimal digits."""
        return self._fingerprint

    @property
    def title(self) -> str:
        """Architecture and the begin of the fingerprint, for pictures."""
        return f'{self._architecture} ({self._fingerprint[:8]})'

    def __getitem__(self, module: str) -> dict[str, Tensor]:
        return {branch: vector.clone() for branch, vector in self._modules[module].items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scales) and self._fingerprint == other._fingerprint

    def __hash__(self) -> int:
        return hash(self._fingerprint)

    def __repr__(self) -> str:
        return f'Scales({self._architecture}, {len(self)} modules, strides={self._strides}, {self._fingerprint[:12]})'

    def with_provenance(self, provenance: Mapping[str, Any], source: str | None = None) -> 'Scales':
        """Returns the same scales with another provenance, and another source if given."""
        source = self._source if source is None else source
        return Scales(self._architecture, self._modules, self._strides, provenance, source)

    def check_target(self, architecture: str, strides: Sequence[int]) -> None:
        """Checks that the scales are those of an architecture with these strides.

        Raises:
            ValueError: If they are not; names both.
        """
        source = self._source or 'The scales'
        if architecture != self._architecture:
            raise ValueError(
                f'{source} are scales of {self._architecture}, but the model is a {architecture}. Scales belong to one '
                f'architecture: search them with {architecture}_hs.'
            )
        if tuple(strides) != self._strides:
            raise ValueError(
                f'{source} were searched with strides {self._strides}, but the model has strides {tuple(strides)}. '
                f'A search and its target need the same: create the model with strides={self._strides}, or search anew.'
            )

    @classmethod
    def initial(cls, architecture: str, strides: Sequence[int] = DEFAULT_STRIDES) -> 'Scales':
        """Returns the values that a Hyper-Search starts from: `sqrt(2 / l)`, identity 1.

        Args:
            architecture: Name of a target model.
            strides: Strides of stem and stages.

        Raises:
            ValueError: If the architecture is unknown.
        """
        if architecture not in ARCHITECTURES:
            raise ValueError(f"Unknown architecture '{architecture}', expected one of {', '.join(ARCHITECTURES)}.")
        modules = ARCHITECTURES[architecture].initial_scales(strides)
        return cls(architecture, modules, strides, {'method': 'initial values, not searched'}, 'initial')

    @classmethod
    def from_model(cls, model: nn.Module, provenance: Mapping[str, Any] | None = None) -> 'Scales':
        """Reads the scales of a Hyper-Search or CSLA model, or those that a target model carries.

        Args:
            model: A model of this package, or any model with `CSLAConv2d` modules or attached scales.
            provenance: Where they come from; the model's own when left out.

        Raises:
            ValueError: If the model has no scales.
        """
        model = unwrap_model(unwrap_model(model))
        modules = {name: module.vectors() for name, module in model.named_modules() if isinstance(module, CSLAConv2d)}
        if not modules:
            modules = {name: carried.vectors for name, carried in carried_scales(model).items()}
        if not modules:
            raise ValueError(
                f'{type(model).__name__} has no scales: it is no _hs or _csla model, and its convolutions carry none.'
            )
        architecture = getattr(model, 'architecture', type(model).__name__)
        strides = getattr(model, 'strides', DEFAULT_STRIDES)
        if provenance is None:
            provenance = getattr(model, 'scales_provenance', None)
        return cls(architecture, modules, strides, provenance)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        architecture: str | None = None,
        strides: Sequence[int] = DEFAULT_STRIDES,
    ) -> 'Scales':
        """Reads scales from a file.

        Args:
            path: A `.safetensors` file that `save` wrote; a checkpoint of a `_hs` or `_csla` run as timm, torch or
                safetensors write it; a `*-scales.pth` or a hyper-search checkpoint of the reference repository.
            architecture: Name of the target model that is hoped for, where the file does not tell and its shapes fit
                several, or no known one.
            strides: Strides of stem and stages, where the file does not tell: a bare state dict has no trace of them.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file has no scales, or they do not fit the architecture.
        """
        source = os.fspath(path)
        checkpoint = read_checkpoint(path)
        metadata = checkpoint.get('__metadata__', {})
        if metadata.get('format') == _FORMAT:
            try:
                return cls._from_own_file(checkpoint, metadata, source)
            except (KeyError, TypeError) as error:
                raise ValueError(f'{source}: its header is damaged ({type(error).__name__}: {error}).') from None
        modules = _modules_of(select_state_dict(checkpoint))
        if not modules:
            raise ValueError(
                f'{source}: no scales in it. Expected a file of scales or a checkpoint of a hyper-search (_hs) model.'
            )
        found = _architecture_of(checkpoint, modules, architecture)
        if found is None and architecture not in ARCHITECTURES:
            found = architecture
        if found is None:
            raise ValueError(
                f'{source}: the scales of its {len(modules)} modules fit no known architecture '
                f'({", ".join(ARCHITECTURES)}). Name the architecture if it is one of your own.'
            )
        return cls(found, modules, _strides_of(checkpoint) or strides, {'converted_from': Path(source).name}, source)

    @classmethod
    def _from_own_file(cls, tensors: dict[str, Any], metadata: Mapping[str, str], source: str) -> 'Scales':
        if int(metadata['version']) > _FORMAT_VERSION:
            raise ValueError(
                f'{source}: written in version {metadata["version"]} of its format, this package reads up to '
                f'{_FORMAT_VERSION}. Upgrade repopt-timm.'
            )
        modules: dict[str, dict[str, Tensor]] = {}
        for key, vector in tensors.items():
            if key != '__metadata__':
                module, branch = key.rsplit('.', 1)
                modules.setdefault(module, {})[branch] = vector
        strides = json.loads(metadata['strides'])
        scales = cls(metadata['architecture'], modules, strides, json.loads(metadata['provenance']), source)
        scales.check_fingerprint(metadata['fingerprint'])
        return scales

    def check_fingerprint(self, expected: str) -> None:
        """Checks the scales against the fingerprint that was stored with them.

        Raises:
            ValueError: If they differ: the scales were changed after they were written.
        """
        if self._fingerprint != expected:
            raise ValueError(
                f'{self._source}: the scales do not match their fingerprint: found {self._fingerprint}, expected '
                f'{expected}. They were changed or damaged after they were written; get them again.'
            )

    def save(self, path: str | os.PathLike) -> None:
        """Writes a `.safetensors` file: tensors `<module>.<branch>`, everything else in the header's metadata.

        Args:
            path: Where to; a process that is killed leaves the old file or the new one.

        Raises:
            ValueError: If the name does not end in `.safetensors`.
        """
        if Path(path).suffix != '.safetensors':
            raise ValueError(f"'{path}': scales are saved as .safetensors, choose a name that ends so.")
        tensors = {
            f'{module}.{branch}': v for module, vectors in self._modules.items() for branch, v in vectors.items()
        }
        metadata = {
            'format': _FORMAT,
            'version': str(_FORMAT_VERSION),
            'architecture': self._architecture,
            'strides': json.dumps(self._strides),
            'fingerprint': self._fingerprint,
            'provenance': self._provenance,
        }
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata)

    @classmethod
    def from_card(cls, path: str | os.PathLike, source: str | None = None) -> 'Scales':
        """Reads scales from a model card.

        Args:
            path: A `README.md`.
            source: What to call it in errors; its path when left out.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the card has no scales, is newer than this package, too large or not in the format, does not
                match its fingerprint, or its scales do not fit the architecture.
        """
        source = source or os.fspath(path)
        entry = read_entry(path, source)
        scales = cls(entry.architecture, entry.modules, entry.strides, entry.provenance, source)
        scales.check_fingerprint(entry.fingerprint)
        return scales

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
    ) -> 'Scales':
        """Reads scales from the card of a repository on the Hugging Face Hub.

        Args:
            repo_id: Name of the repository, `user/repo`.
            revision: Branch, tag or commit.
            cache_dir: The client's cache when left out.
            token: The token of `hf auth login` when left out.

        Raises:
            HubError: If the card cannot be had: no such repository, revision or card, no permission, no connection.
            ValueError: If the card has no scales, or for a reason that `from_card` lists.

        Example:
            >>> scales = Scales.from_hub('user/repopt_vgg_a0.cifar10')  # doctest: +SKIP
        """
        source = str(check_source(repo_id, revision))
        return cls.from_card(download(repo_id, CARD_FILE, revision, cache_dir, token), source)

    def save_pretrained(self, directory: str | os.PathLike, repo_id: str | None = None) -> None:
        """Writes a repository of scales without weights: a model card with a picture.

        A card that is there already keeps its other metadata, and the text outside the marks of this package.

        Args:
            directory: Where to.
            repo_id: Name that it has on the Hub, for the snippets in the card.

        Raises:
            ValueError: If an existing card cannot be read, or could not be carried through unchanged.
        """
        Path(directory).mkdir(parents=True, exist_ok=True)
        write_card(Path(directory), repo_id, self._architecture, self.to_entry())

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        token: str | bool | None = None,
        commit_message: str = 'Scales of repopt-timm',
    ) -> str:
        """Publishes the scales on the Hugging Face Hub; weights that the repository has stay as they are.

        Args:
            repo_id: Name of the repository, `user/repo`, made if there is none.
            private: Whether a new repository is private.
            revision: Branch to commit to, made if there is none.
            create_pr: Open a pull request instead of changing the branch.
            token: The token of `hf auth login` when left out.
            commit_message: Title of the commit.

        Returns:
            Address of the commit or pull request.

        Raises:
            HubError: If the repository cannot be written to.
            ValueError: If its card cannot be read, or could not be carried through unchanged.
        """
        entry = self.to_entry()

        def write(folder: Path, name: str, published: frozenset[str]) -> None:
            write_card(folder, name, self._architecture, entry, published=published)

        return push_folder(repo_id, write, commit_message, private, revision, create_pr, token)

    def to_entry(self) -> CardEntry:
        """Returns the scales as the code that writes model cards takes them."""
        return CardEntry(self._architecture, self._strides, self._modules, self._fingerprint, self.provenance)


def _depth_key(module: str) -> tuple[bool, list[tuple[int, str]]]:
    # Files sort their keys, which puts block 10 before block 2 and the stages before the stem.
    parts = [(int(part), '') if part.isdigit() else (-1, part) for part in module.split('.')]
    return not module.startswith('stem'), parts


def _modules_of(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state_dict.items():
        if match := _OWN_KEY.fullmatch(key):
            module, branch = match[1], match[2] or match[3]
        elif name := scale_name(key):
            module, branch = name
        else:
            continue
        modules.setdefault(module, {})[branch] = tensor.flatten() if branch == 'identity' else tensor
    return modules


def _architecture_of(
    checkpoint: Mapping[str, Any], modules: Mapping[str, Mapping[str, Tensor]], preferred: str | None
) -> str | None:
    name = checkpoint.get('arch')
    if isinstance(name, str):
        name = name.removesuffix('_hs').removesuffix('_csla')
        if name in ARCHITECTURES:
            return name
    channels = {module: len(vectors['kxk']) for module, vectors in modules.items() if 'kxk' in vectors}
    return infer_architecture(channels, preferred)


def _strides_of(checkpoint: Mapping[str, Any]) -> Sequence[int] | None:
    arguments = getattr(checkpoint.get('args'), 'model_kwargs', None) or {}
    return arguments.get('strides')
