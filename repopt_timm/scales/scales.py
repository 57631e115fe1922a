"""Searched scales: the one type that holds them."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import replacing
from ..reparam import (
    CSLAConv2d,
    Geometry,
    carried_scales,
    geometry_of,
    initial_scales,
    network_name,
    resolve_prior,
    twin_vectors,
)
from ..reparam.branches import Branch
from ..reparam.convolutions import conv_prior
from ..reparam.initialization import check_geometry, check_network, scaled_convs
from ..reparam.modules import modules_of, unwrap
from ..reparam.prior import Prior
from ..reparam.vectors import check_vectors, fingerprint

__all__ = ['FORMAT', 'FORMAT_VERSION', 'Scales']

FORMAT = 'repopt_timm.scales'
FORMAT_VERSION = 2


class Scales(Mapping[str, Mapping[str, Tensor]]):
    """The scales of a network: convolution's module name to {branch name: float32 vector of shape (O,)}.

    Immutable: what is handed out are copies. Two are equal when what they were searched on, their names, counts and
    float32 bits are; where they come from does not count.

    Args:
        architecture: Name of the plain network that they were searched on, such as `repopt_vgg_b1`, `resnet18` or the
            class's name; empty if unknown.
        modules: Module name to branch name to vector, in the order of the network.
        geometry: Module name to what it was searched on, for all modules or for none.
        counts: Module name to branch name to number of equal branches. Defaults to 1.
        provenance: Where they come from: JSON-serializable.
        source: File or repository that they were read from, for errors.

    Raises:
        ValueError: If there are no scales, a vector is not finite or does not fit its geometry, a branch is unknown,
            geometry or counts belong to other modules, or the provenance is not JSON-serializable.

    Example:
        >>> scales = Scales.initial(timm.create_model('repopt_vgg_a0'))
        >>> scales['stem.conv']['1x1'].shape
        torch.Size([48])
    """

    def __init__(
        self,
        architecture: str,
        modules: Mapping[str, Mapping[str, Tensor]],
        geometry: Mapping[str, Geometry] | None = None,
        counts: Mapping[str, Mapping[str, int]] | None = None,
        provenance: Mapping[str, Any] | None = None,
        source: str = '',
    ):
        where = source or architecture or 'The scales'
        if not isinstance(modules, Mapping) or not modules:
            raise ValueError(f'{where}: there are no scales in it, expected a mapping of module names to branches.')
        self._architecture = architecture
        self._geometry = {name: geometry[name] for name in modules if name in geometry} if geometry else {}
        if geometry and set(geometry) != set(modules):
            odd = sorted(set(geometry) ^ set(modules))[0]
            raise ValueError(f"{where}: '{odd}' has scales or a geometry, expected both for each module, or none.")
        try:
            self._provenance = json.dumps(dict(provenance or {}))
        except TypeError as error:
            raise ValueError(
                f'{where}: the provenance cannot be stored: {error}. Give plain numbers and text.'
            ) from None
        self._source = source
        self._modules = {
            module: {
                branch: vector.detach().to('cpu', torch.float32).clone() for branch, vector in sorted(vectors.items())
            }
            for module, vectors in _checked(modules, source)
        }
        for module, branches in (counts or {}).items():
            if not isinstance(branches, Mapping):
                raise ValueError(f"{where}: the counts of '{module}' are {branches!r:.80}, expected {{branch: count}}.")
        self._counts = {
            module: {branch: (counts or {}).get(module, {}).get(branch, 1) for branch in vectors}
            for module, vectors in self._modules.items()
        }
        for module, branches in (counts or {}).items():
            if unknown := sorted(set(branches) - set(self._modules.get(module, {}))):
                raise ValueError(f"{where}: there is a count for '{module}', branch '{unknown[0]}', but no scale.")
        for module, vectors in self._modules.items():
            shape = self._geometry.get(module)
            check_vectors(module, vectors, shape.out_channels if shape else None, source=source)
            for branch, count in self._counts[module].items():
                _check_branch(branch, count, shape, f"{where}: module '{module}'")
        self._fingerprint = fingerprint(self._modules, self._architecture, self._geometry, self._counts)

    @property
    def architecture(self) -> str:
        """Name of the plain network that the scales were searched on; empty if unknown."""
        return self._architecture

    @property
    def geometry(self) -> dict[str, Geometry]:
        """Module name to the convolution that the scales were searched on; empty if unknown."""
        return dict(self._geometry)

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Module name to branch name to number of equal branches that share the scale."""
        return {module: dict(counts) for module, counts in self._counts.items()}

    @property
    def provenance(self) -> dict[str, Any]:
        """Where they come from: dataset, epochs, accuracy, seed, versions, date, as far as known."""
        return json.loads(self._provenance)

    @property
    def source(self) -> str:
        """File or repository that the scales were read from, if any."""
        return self._source

    @property
    def fingerprint(self) -> str:
        """The sha256 of architecture, geometry, names, counts and float32 bits, in 64 hexadecimal digits."""
        return self._fingerprint

    @property
    def title(self) -> str:
        """Architecture and the first 8 digits of the fingerprint, for pictures."""
        return f'{self._architecture or "unknown network"} ({self._fingerprint[:8]})'

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
        return f'Scales({self._architecture or "unknown network"}, {len(self)} modules, {self._fingerprint[:12]})'

    def with_provenance(self, provenance: Mapping[str, Any], source: str | None = None) -> 'Scales':
        """Returns the same scales with another provenance, and another source if given."""
        source = self._source if source is None else source
        return Scales(self._architecture, self._modules, self._geometry, self._counts, provenance, source)

    def renamed(self, architecture: str) -> 'Scales':
        """Returns the same scales for the same network under another name."""
        return Scales(architecture, self._modules, self._geometry, self._counts, self.provenance, self._source)

    def for_model(self, model: nn.Module) -> 'Scales':
        """Returns the scales with name and geometry of a model that they fit, which a file may not state.

        Args:
            model: The plain network, a twin of it, or a wrapper for parallel training or compilation around it.

        Raises:
            ValueError: If they were searched on another network; names the convolution and both geometries.
        """
        inner = unwrap(model)
        check_network(inner, self)
        if twin_modules := {name: m for name, m in modules_of(inner).items() if isinstance(m, CSLAConv2d)}:
            self._check_twin(network_name(inner), twin_modules)
        else:
            scaled_convs(inner, self)
            self._check_complete(inner)
        name, geometry = network_name(inner), geometry_of(inner, self)
        modules = {module: self._modules[module] for module in geometry}
        return Scales(name, modules, geometry, self._counts, self.provenance, self._source)

    def _check_twin(self, network: str, convs: Mapping[str, CSLAConv2d]) -> None:
        source = self._source or 'The scales'
        for name in {**convs, **self}:
            if name not in convs:
                raise ValueError(f"{source}: there are scales for '{name}', which {network} has no branches at.")
            if name not in self:
                raise ValueError(f"{source}: module '{name}' of {network} has no scales. Search it anew.")
            if name in self._geometry:
                check_geometry(name, self._geometry[name], convs[name], source)
            conv = convs[name]
            check_vectors(name, self._modules[name], conv.out_channels, conv.branch_counts, self._source)

    def _check_complete(self, model: nn.Module) -> None:
        """Checks scales that do not state their geometry against the prior that the model's convolutions carry."""
        for name, module in modules_of(model).items():
            prior = None if self._geometry else conv_prior(module)
            if prior is None:
                continue
            where = self._source or 'The scales'
            if name not in self:
                raise ValueError(f"{where}: module '{name}' of {network_name(model)} has no scales. Search it anew.")
            check_vectors(name, self._modules[name], expected=prior.branches, source=self._source)

    @classmethod
    def initial(cls, model: nn.Module, prior: Prior | None = None) -> 'Scales':
        """Returns the values that a Hyper-Search of a model starts from.

        `sqrt(2 / l)` in a RepOpt-VGG, `sqrt(2 / (n + 1))` elsewhere, identity 1; see `repopt_timm.repvgg_prior`.

        Args:
            model: Any plain network.
            prior: Module name to branches, or a function that returns such a mapping. Defaults to `repvgg_prior`.

        Raises:
            ValueError: If a convolution that the prior names cannot have its branches.
        """
        if not isinstance(model, nn.Module):
            raise ValueError(f'Scales.initial needs a model, but got {model!r:.80}: create it first.')
        resolved = resolve_prior(model, prior)
        return cls(
            network_name(model),
            initial_scales(model, resolved),
            geometry_of(model, resolved),
            {name: each.branches for name, each in resolved.items()},
            {'method': 'initial values, not searched'},
            'initial',
        )

    @classmethod
    def from_model(cls, model: nn.Module, provenance: Mapping[str, Any] | None = None) -> 'Scales':
        """Reads the scales of a Hyper-Search or CSLA model, or what a plain model carries.

        Args:
            model: Any model with `CSLAConv2d` modules or attached scales. Where `fully_shard` has sharded a search,
                all processes have to call this.
            provenance: Where they come from. Defaults to what the model says in `scales_provenance`.

        Raises:
            ValueError: If the model has no scales.
        """
        model = unwrap(model)
        modules: Mapping[str, Mapping[str, Tensor]] = twin_vectors(model)
        counts = {name: m.branch_counts for name, m in modules_of(model).items() if isinstance(m, CSLAConv2d)}
        if not modules:
            carried = carried_scales(model)
            modules = {name: each.vectors for name, each in carried.items()}
            counts = {name: each.counts for name, each in carried.items()}
        if not modules:
            raise ValueError(
                f'{type(model).__name__} has no scales: it has no CSLA convolutions, and its plain ones carry none.'
            )
        if provenance is None:
            provenance = getattr(model, 'scales_provenance', None)
        return cls(network_name(model), modules, geometry_of(model, modules), counts, provenance)

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

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> 'Scales':
        import struct

        from safetensors.torch import load

        size = struct.unpack('<Q', data[:8])[0]
        metadata = json.loads(data[8 : 8 + size])['__metadata__']
        try:
            return _from_own_file(load(data), metadata, source)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{source}: its header is damaged ({type(error).__name__}: {error}).') from None

    def save(self, path: str | os.PathLike) -> None:
        """Writes a `.safetensors` file: tensors `<module>.<branch>`, everything else in the header's metadata.

        The metadata are `format`, `version`, `architecture`, `modules` (their names in the order of the
        network), `geometry` (module name to `str(Geometry)`), `counts`, `fingerprint` and `provenance`.

        Args:
            path: File to write; a process that is killed leaves the old file or the new one.

        Raises:
            ValueError: If the name does not end in `.safetensors`.
        """
        if Path(path).suffix != '.safetensors':
            raise ValueError(f"'{path}': scales are saved as .safetensors, choose a name with that ending.")
        tensors = {
            f'{module}.{branch}': v for module, vectors in self._modules.items() for branch, v in vectors.items()
        }
        metadata = {
            'format': FORMAT,
            'version': str(FORMAT_VERSION),
            'architecture': self._architecture,
            'modules': json.dumps(list(self._modules)),
            'geometry': json.dumps({name: str(each) for name, each in self._geometry.items()}),
            'counts': json.dumps(self._counts),
            'fingerprint': self._fingerprint,
            'provenance': self._provenance,
        }
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata)


def _check_branch(branch: str, count: int, shape: Geometry | None, where: str) -> None:
    try:
        # Without a geometry any window may fit.
        made = Branch.of(branch, shape.kernel_size if shape else (2**31 - 1, 2**31 - 1), count)
    except ValueError as error:
        raise ValueError(f'{where}: {error}') from None
    if made.diagonal and shape is not None:
        # Any images may enter a network's first convolution.
        alike = shape.in_channels in (None, shape.out_channels)
        if shape.stride != (1, 1) or not alike:
            raise ValueError(
                f'{where}: an identity branch needs stride 1 and as many input as output channels, but the '
                f'convolution has {shape}.'
            )


def _checked(modules: Mapping[str, Any], source: str) -> list[tuple[str, Mapping[str, Tensor]]]:
    for module, vectors in modules.items():
        if not isinstance(vectors, Mapping):
            raise ValueError(f"{source or 'Scales'}: '{module}' has a {type(vectors).__name__}, expected a mapping.")
        check_vectors(module, vectors, source=source)
    return list(modules.items())


def _from_own_file(tensors: dict[str, Any], metadata: Mapping[str, str], source: str) -> Scales:
    version = _parsed(metadata, 'version', source)
    if version != FORMAT_VERSION:
        newer = version > FORMAT_VERSION
        advice = 'Upgrade repopt-timm.' if newer else 'Extract the scales from their checkpoint again.'
        raise ValueError(
            f'{source}: written in version {version} of its format, this package reads version {FORMAT_VERSION}. '
            f'{advice}'
        )
    names, geometry, counts, provenance = (
        _parsed(metadata, key, source) for key in ('modules', 'geometry', 'counts', 'provenance')
    )
    found: dict[str, dict[str, Tensor]] = {}
    for key, vector in tensors.items():
        if key != '__metadata__':
            module, _, branch = key.rpartition('.')
            found.setdefault(module, {})[branch] = vector
    modules = {module: found.pop(module) for module in names}
    if found:
        raise ValueError(f"{source}: its header does not list the module '{next(iter(found))}'. The file is damaged.")
    shapes = _parse_geometry(geometry, source)
    scales = Scales(metadata['architecture'], modules, shapes, counts, provenance, source)
    scales.check_fingerprint(metadata['fingerprint'])
    return scales


def _parsed(metadata: Mapping[str, str], key: str, source: str) -> Any:
    try:
        return json.loads(metadata[key])
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{source}: '{key}' of its header is damaged ({type(error).__name__}: {error}).") from None


def _parse_geometry(geometry: Mapping[str, Any], source: str) -> dict[str, Geometry]:
    try:
        return {name: Geometry.parse(text) for name, text in geometry.items()}
    except ValueError as error:
        raise ValueError(f'{source}: {error} The file is damaged.') from None
