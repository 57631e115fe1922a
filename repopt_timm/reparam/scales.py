"""Scales: what a Hyper-Search finds, and all that the two rules of the method need to know about a network."""

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import replacing
from .branches import STARTS, Branch, make_branches
from .convolution import branches_of
from .modules import modules_of, network_name, pair, unwrap
from .prior import Prior, conv_prior, refusal, resolve_prior

__all__ = ['CarriedScales', 'Geometry', 'Scales', 'carried_scales', 'drop_scales', 'geometry_of']

_FORMAT = 'repopt_timm.scales'
_FORMAT_VERSION = 2
_CARRIED_ATTRIBUTE = 'repopt_scales'
_N = r'([1-9]\d{0,8})'
_GEOMETRY = re.compile(rf'(any|[1-9]\d{{0,8}}) -> {_N} channels, {_N}x{_N}, stride {_N}x{_N}, groups {_N}')
# Without a geometry any window may fit.
_ANY_KERNEL = (2**31 - 1, 2**31 - 1)


@dataclass(frozen=True)
class Geometry:
    """What scales were searched on: one convolution, as it was constructed.

    Attributes:
        in_channels: Number of input channels; None for a network's first convolution, which any images may enter.
        out_channels: Number of output channels.
        kernel_size: Height and width.
        stride: Vertical and horizontal stride, before an `output_stride` turned it into dilation.
        groups: Number of groups.
    """

    in_channels: int | None
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, conv: Any, first: bool = False) -> 'Geometry':
        """Reads the geometry of an `nn.Conv2d`; `first` says that it is the network's first."""
        prior = conv_prior(conv)
        return cls(
            in_channels=None if first else conv.in_channels,
            out_channels=conv.out_channels,
            kernel_size=tuple(conv.kernel_size),
            stride=pair(conv.stride if prior is None or prior.stride is None else prior.stride),
            groups=conv.groups,
        )

    @classmethod
    def parse(cls, text: str) -> 'Geometry':
        """Parses what `str` makes of a geometry, such as `64 -> 128 channels, 3x3, stride 2x2, groups 1`.

        Raises:
            ValueError: If it is not of this form.
        """
        match = _GEOMETRY.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(
                f"'{text!s:.100}' is not a geometry such as '64 -> 128 channels, 3x3, stride 2x2, groups 1'."
            )
        out_channels, height, width, vertical, horizontal, groups = map(int, match.groups()[1:])
        in_channels = None if match[1] == 'any' else int(match[1])
        return cls(in_channels, out_channels, (height, width), (vertical, horizontal), groups)

    def __str__(self) -> str:
        channels = f'{"any" if self.in_channels is None else self.in_channels} -> {self.out_channels} channels'
        kernel, stride = ('x'.join(map(str, pair)) for pair in (self.kernel_size, self.stride))
        return f'{channels}, {kernel}, stride {stride}, groups {self.groups}'


class Scales(Mapping[str, Mapping[str, Tensor]]):
    """The scales of a network: convolution's module name to {branch name: float32 vector of shape (O,)}.

    Immutable: the vectors that it hands out are copies. Two are equal if architecture, geometry, names, counts, start
    and float32 bits are; provenance and source do not count.

    Args:
        architecture: Name of the plain network that they were searched on, such as `repopt_vgg_b1`, `resnet18` or the
            class's name; empty if unknown.
        modules: Module name to branch name to vector, in the order of the network.
        geometry: Module name to the convolution that was searched, for all modules or for none.
        counts: Module name to branch name to number of equal branches. Defaults to 1.
        provenance: Where they come from: JSON-serializable.
        source: File or repository that they were read from, for errors.
        start: Start of the operators: `paper` or `identity`, see `draw_operators`.

    Raises:
        ValueError: If `modules` is empty, a vector is not finite or does not fit its geometry, a branch or the start is
            unknown, or geometry or counts belong to other modules.
        TypeError: If the provenance is not JSON-serializable.

    Example:
        >>> scales = Scales.initial(timm.create_model('repopt_vgg_a0'))
        >>> scales['stem.conv']['1x1'].shape
        torch.Size([48])
    """

    # Of scales that were pickled before they had one.
    _start = 'paper'

    def __init__(
        self,
        architecture: str,
        modules: Mapping[str, Mapping[str, Tensor]],
        geometry: Mapping[str, Geometry] | None = None,
        counts: Mapping[str, Mapping[str, int]] | None = None,
        provenance: Mapping[str, Any] | None = None,
        source: str = '',
        start: str = 'paper',
    ):
        geometry, counts = dict(geometry or {}), dict(counts or {})
        self._architecture, self._source = architecture, source
        self._provenance = json.dumps(dict(provenance or {}))
        self._geometry = {name: geometry[name] for name in modules if name in geometry}
        self._modules: dict[str, dict[str, Tensor]] = {}
        self._counts: dict[str, dict[str, int]] = {}
        where = source or architecture or 'The scales'
        self._start = _checked_start(start)
        if not modules:
            raise ValueError(f'{where}: there are no scales in it.')
        if odd := (set(geometry) ^ set(modules) if geometry else set()) | (set(counts) - set(modules)):
            raise ValueError(f"{where}: '{min(odd)}' has scales, a geometry or counts, and not the others.")
        for name, vectors in modules.items():
            given = counts.get(name, {})
            if unknown := set(given) - set(vectors):
                raise ValueError(f"{where}: module '{name}' has a count of the branch '{min(unknown)}', but no scale.")
            self._counts[name] = {branch: given.get(branch, 1) for branch in sorted(vectors)}
            self._modules[name] = _checked(vectors, self._counts[name], geometry.get(name), f"{where}: module '{name}'")

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
    def start(self) -> str:
        """Start of the operators, `paper` or `identity`: what the Rule of Initialization and the twins draw."""
        return self._start

    @property
    def source(self) -> str:
        """File or repository that the scales were read from, if any."""
        return self._source

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of architecture, geometry, names, counts, float32 bits and start, in 64 hexadecimal digits."""
        digest = hashlib.sha256(json.dumps(self._architecture).encode())
        if self._start != 'paper':
            # Scales from before there was a choice keep their fingerprint.
            digest.update(json.dumps({'start': self._start}).encode())
        for module in sorted(self._modules):
            geometry = str(self._geometry[module]) if module in self._geometry else None
            digest.update(json.dumps([module, geometry]).encode())
            for branch, vector in self._modules[module].items():
                digest.update(json.dumps([branch, self._counts[module][branch], len(vector)]).encode())
                digest.update(vector.numpy().astype('<f4').tobytes())
        return digest.hexdigest()

    @property
    def title(self) -> str:
        """Architecture and the first 8 digits of the fingerprint, for pictures."""
        return f'{self._architecture or "unknown network"} ({self.fingerprint[:8]})'

    def __getitem__(self, module: str) -> dict[str, Tensor]:
        return {branch: vector.clone() for branch, vector in self._modules[module].items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scales) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f'Scales({self._architecture or "unknown network"}, {len(self)} modules, {self.fingerprint[:12]})'

    def __deepcopy__(self, memo: dict[int, Any]) -> 'Scales':
        # Each convolution of a network carries them: copies of it share them.
        return self

    def _replaced(self, **attributes: Any) -> 'Scales':
        """Returns a copy with other attributes, which the caller has checked."""
        copied = copy.copy(self)
        vars(copied).pop('fingerprint', None)
        vars(copied).update({f'_{name}': value for name, value in attributes.items()})
        return copied

    def with_provenance(self, provenance: Mapping[str, Any], source: str | None = None) -> 'Scales':
        """Returns the same scales with another provenance, and another source if given."""
        return self._replaced(
            provenance=json.dumps(dict(provenance)), source=self._source if source is None else source
        )

    def renamed(self, architecture: str) -> 'Scales':
        """Returns the same scales for the same network under another name."""
        return self._replaced(architecture=architecture)

    def with_start(self, start: str) -> 'Scales':
        """Returns the same scales with another start of the operators, `paper` or `identity`."""
        return self._replaced(start=_checked_start(start))

    def for_model(self, model: nn.Module) -> 'Scales':
        """Returns the scales with name and geometry of a model that they fit, which a file may not state.

        Args:
            model: The plain network, a twin of it, or a wrapper for parallel training or compilation around it.

        Raises:
            ValueError: If they were searched on another network; names the convolution and both geometries.
        """
        model = unwrap(model)
        network, where = network_name(model), self._source or 'The scales'
        if self._architecture not in ('', network):
            raise ValueError(
                f'{where}: these are scales of {self._architecture}, but the model is a {network}. Scales belong to '
                f'one network: search some for {network}, or, if both are the same under two names, use '
                f"scales.renamed('{network}')."
            )
        modules = modules_of(model)
        for name in self:
            if not isinstance(conv := modules.get(name), nn.Conv2d):
                raise ValueError(
                    f"{where}: there are scales for a convolution '{name}', but {network} has "
                    f'{"no such module" if conv is None else f"a {type(conv).__name__} there"}. Scales go by module '
                    f'name: use the scales of this network.'
                )
        twins = {name: branches.counts for name, each in modules.items() if (branches := branches_of(each))}
        priors = {name: prior.branches for name, each in modules.items() if (prior := conv_prior(each))}
        # Scales that state no geometry are held to the prior: a file may lack some of them.
        expected = twins or ({} if self._geometry else priors)
        if missing := [name for name in expected if name not in self]:
            raise ValueError(f"{where}: module '{missing[0]}' of {network} has no scales. Search it anew.")
        geometry = geometry_of(model, self)
        for name, found in geometry.items():
            conv, counts, here = modules[name], self._counts[name], f"{where}: module '{name}' of {network}"
            if name not in twins and (reason := refusal(conv)):
                raise ValueError(f'{here} cannot have scales: {reason}. Search anew without it.')
            searched = self._geometry.get(name, found)
            # The other network may have it elsewhere than first.
            if searched != (same := Geometry.of(conv, first=searched.in_channels is None)):
                raise ValueError(
                    f"{here}: the scales were searched with '{name}' of {searched}, but the model has {same} there. "
                    f'Make the model alike (strides, widths), or search anew.'
                )
            if (twins and counts != twins[name]) or (name in expected and set(counts) != set(expected[name])):
                raise ValueError(f'{here} has the branches {expected[name]}, but the scales are for {counts}.')
            if name not in self._geometry:
                _check_fit(self._modules[name], counts, found, here)
        if network == self._architecture and list(geometry.items()) == list(self._geometry.items()):
            return self
        modules_in_order = {name: self._modules[name] for name in geometry}
        return self._replaced(architecture=network, geometry=geometry, modules=modules_in_order)

    @classmethod
    def initial(cls, model: nn.Module, prior: Prior | None = None, start: str = 'paper') -> 'Scales':
        """Returns the values that a Hyper-Search of a model starts from.

        `sqrt(2 / l)` in a RepOpt-VGG, `sqrt(2 / (n + 1))` elsewhere, identity 1; see `repopt_timm.repvgg_prior`.

        Args:
            model: Any plain network.
            prior: Module name to branches, or a function that returns such a mapping. Defaults to `repvgg_prior`.
            start: Start of the operators: `paper` or `identity`, see `draw_operators`.

        Raises:
            ValueError: If a convolution that the prior names cannot have its branches, or the start is unknown.
        """
        model = unwrap(model)
        resolved = resolve_prior(model, prior)
        geometry = geometry_of(model, resolved)
        modules = {
            name: {
                branch: torch.full(
                    (geometry[name].out_channels,), 1.0 if branch == 'identity' else each.initial, device='cpu'
                )
                for branch in each.branches
            }
            for name, each in resolved.items()
        }
        counts = {name: each.branches for name, each in resolved.items()}
        provenance = {'method': 'initial values, not searched'}
        return cls(network_name(model), modules, geometry, counts, provenance, 'initial', start)

    @classmethod
    def from_model(cls, model: nn.Module, provenance: Mapping[str, Any] | None = None) -> 'Scales':
        """Reads the scales of a Hyper-Search or CSLA model, or the scales that a plain model carries.

        Args:
            model: Any model with CSLA convolutions or attached scales. Where `fully_shard` has sharded a search, all
                processes have to call this.
            provenance: Where they come from. Defaults to the model's `scales_provenance`.

        Raises:
            ValueError: If the model has no scales, or they have several starts.
        """
        model = unwrap(model)
        found = {name: branches for name, each in modules_of(model).items() if (branches := branches_of(each))}
        modules = {name: branches.vectors() for name, branches in found.items()}
        counts = {name: branches.counts for name, branches in found.items()}
        starts = {branches.start for branches in found.values()}
        for name, carried in ({} if found else carried_scales(model)).items():
            modules[name] = carried.scales._modules[carried.module]
            counts[name] = carried.scales._counts[carried.module]
            starts.add(carried.scales.start)
        if not modules:
            raise ValueError(
                f'{type(model).__name__} has no scales: it has no CSLA convolutions, and its plain ones carry none.'
            )
        if provenance is None:
            provenance = getattr(model, 'scales_provenance', None)
        if len(starts) > 1:
            raise ValueError(
                f'The scales of {type(model).__name__} have the starts {" and ".join(sorted(starts))}: read them from '
                f'each of its parts.'
            )
        return cls(network_name(model), modules, geometry_of(model, modules), counts, provenance, start=starts.pop())

    def check_fingerprint(self, expected: str) -> None:
        """Checks the scales against the fingerprint that was stored with them.

        Raises:
            ValueError: If they differ: the scales were changed after they were written.
        """
        if self.fingerprint != expected:
            raise ValueError(
                f'{self._source}: the scales do not match their fingerprint: found {self.fingerprint}, expected '
                f'{expected}. They were changed or damaged after they were written; get them again.'
            )

    def to_bytes(self) -> bytes:
        """Returns the scales as the content of a `.safetensors` file.

        Its tensors are `<module>.<branch>`. Its metadata are `format`, `version`, `architecture`, `modules` (their
        names in the order of the network), `geometry` (module name to `str(Geometry)`), `counts`, `fingerprint`,
        `provenance`, and `start` unless it is `paper`.
        """
        from safetensors.torch import save

        tensors = {f'{name}.{branch}': v for name, vectors in self._modules.items() for branch, v in vectors.items()}
        metadata = {
            'format': _FORMAT,
            'version': str(_FORMAT_VERSION),
            'architecture': self._architecture,
            'modules': json.dumps(list(self._modules)),
            'geometry': json.dumps({name: str(each) for name, each in self._geometry.items()}),
            'counts': json.dumps(self._counts),
            'fingerprint': self.fingerprint,
            'provenance': self._provenance,
        }
        if self._start != 'paper':
            metadata['start'] = self._start
        return save(tensors, metadata)

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> 'Scales':
        """Reads what `to_bytes` returned.

        Args:
            data: Content of a file, which may come from anyone.
            source: Its name, for errors and as the source of the scales.

        Raises:
            ValueError: If it is not a file of scales, is of another version, or was changed after it was written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            tensors = load(data)
            size = int.from_bytes(data[:8], 'little')
            header = json.loads(data[8 : 8 + size]).get('__metadata__', {})
            version = json.loads(header['version']) if header.get('format') == _FORMAT else None
            if version != _FORMAT_VERSION:
                raise ValueError(f'format {header.get("format")}, version {version}, expected {_FORMAT_VERSION}')
            modules: dict[str, dict[str, Tensor]] = {name: {} for name in json.loads(header['modules'])}
            for key, vector in tensors.items():
                name, _, branch = key.rpartition('.')
                modules[name][branch] = vector
            geometry = {name: Geometry.parse(text) for name, text in json.loads(header['geometry']).items()}
            counts, provenance = json.loads(header['counts']), json.loads(header['provenance'])
            scales = cls(
                header['architecture'], modules, geometry, counts, provenance, source, header.get('start', 'paper')
            )
            expected = header['fingerprint']
        except (SafetensorError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f'{source}: not a file of scales that this version reads, or damaged: {error!r}') from None
        scales.check_fingerprint(expected)
        return scales

    def save(self, path: str | os.PathLike) -> None:
        """Writes the scales to a `.safetensors` file; see `to_bytes`.

        Args:
            path: File to write; a process that is killed leaves the old file or the new one.

        Raises:
            ValueError: If the name does not end in `.safetensors`.
        """
        if Path(path).suffix != '.safetensors':
            raise ValueError(f"'{path}': scales are saved as .safetensors, choose a name with that ending.")
        with replacing(path) as temporary:
            Path(temporary).write_bytes(self.to_bytes())


@dataclass(frozen=True)
class CarriedScales:
    """The scales that a convolution of a plain network carries, as an attribute of the module.

    A module's attribute survives copies, pickling, renaming, wrapping and casts, where a parameter's attribute, its
    position or a buffer's dtype would not.

    Attributes:
        scales: The scales of the whole network.
        module: Name of the convolution in that network.
        initialized: Whether the convolution's weight came from the Rule of Initialization.
    """

    scales: Scales
    module: str
    initialized: bool = False

    def put_on(self, conv: nn.Module) -> None:
        """Lets the convolution carry the scales."""
        setattr(conv, _CARRIED_ATTRIBUTE, self)


def carried_scales(model: nn.Module) -> dict[str, CarriedScales]:
    """Collects the scales that the convolutions of a model carry, by module name."""
    modules = modules_of(model)
    return {name: vars(each)[_CARRIED_ATTRIBUTE] for name, each in modules.items() if _CARRIED_ATTRIBUTE in vars(each)}


def drop_scales(conv: nn.Module) -> None:
    """Takes the scales off a convolution, whose weight is another one from now on."""
    vars(conv).pop(_CARRIED_ATTRIBUTE, None)


def geometry_of(model: nn.Module, names: Mapping[str, object]) -> dict[str, Geometry]:
    """Reads the geometry of the named convolutions, plain or CSLA, in the order of the model's modules."""
    convs = [(name, each) for name, each in modules_of(model).items() if isinstance(each, nn.Conv2d)]
    return {name: Geometry.of(conv, first=index == 0) for index, (name, conv) in enumerate(convs) if name in names}


def _checked_start(start: str) -> str:
    if start not in STARTS:
        raise ValueError(f"The start of scales is '{start!s:.50}', expected one of {', '.join(STARTS)}.")
    return start


def _checked(
    vectors: Mapping[str, Tensor], counts: Mapping[str, int], geometry: Geometry | None, where: str
) -> dict[str, Tensor]:
    """Returns copies of the vectors of one convolution in float32, sorted by name.

    Raises:
        ValueError: If the branches do not fit, or a vector has a wrong shape, is complex, has a NaN or infinite entry,
            or is all zeros and not an identity's.
    """
    found: dict[str, Tensor] = {}
    for branch, vector in sorted(vectors.items()):
        here = f"{where}: the scale of branch '{branch}'"
        if vector.is_complex() or vector.ndim != 1:
            raise ValueError(f'{here} is {vector.dtype} of shape {tuple(vector.shape)}, expected one real dimension.')
        found[branch] = vector.detach().to('cpu', torch.float32, copy=True)
        if not found[branch].isfinite().all():
            channel = int(found[branch].isfinite().logical_not().nonzero()[0])
            raise ValueError(
                f'{here} is {found[branch][channel].item()} at channel {channel}. Take the scales of an earlier '
                f'checkpoint of the search.'
            )
        if branch != 'identity' and not found[branch].any():
            raise ValueError(f'{here} is all zeros, so the branch would never train.')
    _check_fit(found, counts, geometry, where)
    return found


def _check_fit(vectors: Mapping[str, Tensor], counts: Mapping[str, int], geometry: Geometry | None, where: str) -> None:
    try:
        if geometry is None:
            for branch, count in counts.items():
                Branch.of(branch, _ANY_KERNEL, count)
        else:
            make_branches(counts, geometry)
    except ValueError as error:
        raise ValueError(f'{where}: {error}') from None
    channels = len(next(iter(vectors.values()))) if geometry is None else geometry.out_channels
    for branch, vector in vectors.items():
        if len(vector) != channels:
            raise ValueError(
                f"{where}: the scale of branch '{branch}' has {len(vector)} channels, expected {channels}."
            )
