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
from .branches import STARTS, make_branches
from .convolution import branches_of
from .modules import modules_of, network_name, pair, unwrap
from .prior import Prior, carried_priors, refusal, resolve_prior

ScalesMapping = Mapping[str, Mapping[str, Tensor]]
"""Module name to branch name to vector of shape (O,): `repopt_timm.Scales`, or any mapping of this form."""

_FORMAT = 'repopt_timm.scales'
_VERSION = 2
_GEOMETRY = re.compile(r'(any|\d+) -> (\d+) channels, (\d+)x(\d+), stride (\d+)x(\d+), groups (\d+)')


@dataclass(frozen=True)
class Geometry:
    """What scales were searched on: one convolution, as it was constructed, before an `output_stride` changed it.

    A network's first convolution, which any images may enter, has None for its input channels.
    """

    in_channels: int | None
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, conv: Any, first: bool = False) -> 'Geometry':
        """Reads the geometry of an `nn.Conv2d`; `first` says that it is the network's first."""
        prior = getattr(conv, 'repopt_prior', None)
        stride = pair(conv.stride if prior is None or prior.stride is None else prior.stride)
        in_channels = None if first else conv.in_channels
        return cls(in_channels, conv.out_channels, tuple(conv.kernel_size), stride, conv.groups)

    @classmethod
    def parse(cls, text: str) -> 'Geometry':
        """Parses what `str` makes of a geometry, such as `64 -> 128 channels, 3x3, stride 2x2, groups 1`."""
        match = _GEOMETRY.fullmatch(text)
        if match is None:
            raise ValueError(f"'{text:.100}' is not a geometry like '64 -> 128 channels, 3x3, stride 2x2, groups 1'.")
        inputs = None if match[1] == 'any' else int(match[1])
        outputs, height, width, vertical, horizontal, groups = map(int, match.groups()[1:])
        return cls(inputs, outputs, (height, width), (vertical, horizontal), groups)

    def __str__(self) -> str:
        channels = f'{"any" if self.in_channels is None else self.in_channels} -> {self.out_channels} channels'
        kernel, stride = ('x'.join(map(str, each)) for each in (self.kernel_size, self.stride))
        return f'{channels}, {kernel}, stride {stride}, groups {self.groups}'


class Scales(ScalesMapping):
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

    def __init__(
        self,
        architecture: str,
        modules: ScalesMapping,
        geometry: Mapping[str, Geometry] | None = None,
        counts: Mapping[str, Mapping[str, int]] | None = None,
        provenance: Mapping[str, Any] | None = None,
        source: str = '',
        start: str = 'paper',
    ):
        geometry, counts = geometry or {}, counts or {}
        where = source or architecture or 'The scales'
        if start not in STARTS:
            raise ValueError(f"{where}: the start is '{start!s:.50}', expected one of {', '.join(STARTS)}.")
        if not modules:
            raise ValueError(f'{where}: there are no scales in it.')
        if odd := (set(geometry) ^ set(modules) if geometry else set()) | (set(counts) - set(modules)):
            raise ValueError(f"{where}: '{min(odd)}' has scales, a geometry or counts, and not the others.")
        self._architecture, self._source, self._start = architecture, source, start
        self._provenance = json.loads(json.dumps(dict(provenance or {})))
        self._geometry = {name: geometry[name] for name in modules if geometry}
        self._modules: dict[str, dict[str, Tensor]] = {}
        self._counts: dict[str, dict[str, int]] = {}
        for name, vectors in modules.items():
            self._counts[name] = {branch: 1 for branch in sorted(vectors)} | dict(counts.get(name, {}))
            try:
                self._modules[name] = _checked(vectors, self._counts[name], geometry.get(name))
            except ValueError as error:
                raise ValueError(f"{where}: module '{name}': {error}") from None

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
        return copy.deepcopy(self._provenance)

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
        return f'Scales({self.title}, {len(self)} modules)'

    def __deepcopy__(self, memo: dict[int, Any]) -> 'Scales':
        # Each convolution of a network carries them: copies of it share them.
        return self

    def _replaced(self, **changes: Any) -> 'Scales':
        given = {name.removeprefix('_'): value for name, value in vars(self).items() if name != 'fingerprint'}
        return Scales(**{**given, **changes})

    def with_provenance(self, provenance: Mapping[str, Any], source: str | None = None) -> 'Scales':
        """Returns the same scales with another provenance, and another source if given."""
        return self._replaced(provenance=provenance, source=self._source if source is None else source)

    def renamed(self, architecture: str) -> 'Scales':
        """Returns the same scales for the same network under another name."""
        return self._replaced(architecture=architecture)

    def with_start(self, start: str) -> 'Scales':
        """Returns the same scales with another start of the operators, `paper` or `identity`."""
        return self._replaced(start=start)

    def for_model(self, model: nn.Module) -> 'Scales':
        """Checks that the scales fit a model, and fills in its name and geometry, which a file may lack.

        Args:
            model: The plain network, a twin of it, or a wrapper for parallel training or compilation around it.

        Raises:
            ValueError: If they were searched on another network; names the convolution and both geometries.
        """
        model = unwrap(model)
        network, where = network_name(model), self._source or 'The scales'
        if self._architecture not in ('', network):
            raise ValueError(
                f'{where}: these are scales of {self._architecture}, but the model is a {network}. Search some for it, '
                f"or, if both are the same under two names, use scales.renamed('{network}')."
            )
        modules = modules_of(model)
        twins = {name: branches.counts for name, each in modules.items() if (branches := branches_of(each))}
        expected = twins
        if not twins and not self._geometry:
            # A file that states no geometry may lack some convolutions.
            expected = {name: prior.branches for name, prior in carried_priors(model).items()}
        if missing := [name for name in expected if name not in self]:
            raise ValueError(f"{where}: module '{missing[0]}' of {network} has no scales. Search it anew.")
        for name, counts in self._counts.items():
            conv, allowed = modules.get(name), expected.get(name)
            if not isinstance(conv, nn.Conv2d):
                raise ValueError(
                    f"{where}: there are scales for a convolution '{name}', but {network} has "
                    f'{"no such module" if conv is None else type(conv).__name__}. Use the scales of this network.'
                )
            if name not in twins and (reason := refusal(conv)):
                raise ValueError(f"{where}: module '{name}' of {network} cannot have scales: {reason}. Search anew.")
            if (twins and counts != allowed) or (allowed and set(counts) != set(allowed)):
                raise ValueError(f"{where}: '{name}' of {network} has the branches {allowed}, the scales {counts}.")
        for name, searched in self._geometry.items():
            # The other network may have it elsewhere than first.
            found = Geometry.of(modules[name], first=searched.in_channels is None)
            if found != searched:
                raise ValueError(
                    f"{where}: the scales were searched with '{name}' of {searched}, but {network} has {found} there. "
                    f'Make the model alike (strides, widths), or search anew.'
                )
        for name, counts in self._counts.items():
            try:
                make_branches(counts, modules[name])
            except ValueError as error:
                raise ValueError(f"{where}: '{name}' of {network}: {error}") from None
        geometry = geometry_of(model, self)
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
        modules: dict[str, dict[str, Tensor]] = {}
        for name, each in resolved.items():
            # On the CPU, also under another default device.
            ones = torch.ones(geometry[name].out_channels, device='cpu')
            modules[name] = {branch: ones if branch == 'identity' else each.initial * ones for branch in each.branches}
        counts = {name: each.branches for name, each in resolved.items()}
        provenance = {'method': 'initial values, not searched'}
        return cls(network_name(model), modules, geometry, counts, provenance, 'initial', start)

    @classmethod
    def from_model(cls, model: nn.Module, provenance: Mapping[str, Any] | None = None) -> 'Scales':
        """Reads the scales of a Hyper-Search or CSLA model, or the scales that a plain model carries.

        Args:
            model: Any model with CSLA convolutions or attached scales. Where `fully_shard` has sharded a search, all
                processes have to call this.
            provenance: Where they come from. Defaults to the provenance of the scales that the model carries, or that a
                CSLA model was made with.

        Raises:
            ValueError: If the model has no scales, or they have several starts.
        """
        model = unwrap(model)
        found = {name: branches for name, each in modules_of(model).items() if (branches := branches_of(each))}
        modules = {name: branches.vectors() for name, branches in found.items()}
        counts = {name: branches.counts for name, branches in found.items()}
        starts = {branches.start for branches in found.values()}
        parts = [part.scales_provenance for part in model.modules() if hasattr(part, 'scales_provenance')]
        origins: list[Any] = (parts or [None]) if found else []
        for name, carried in ({} if found else carried_scales(model)).items():
            modules[name] = carried.scales[carried.module]
            counts[name] = carried.scales._counts[carried.module]
            starts.add(carried.scales.start)
            origins.append(carried.scales._provenance)
        if not modules:
            raise ValueError(f'{type(model).__name__} has no scales: its convolutions carry none. Name some.')
        if len(starts) > 1:
            raise ValueError(f'{type(model).__name__} has the starts {" and ".join(sorted(starts))}: read each part.')
        if provenance is None and all(origin == origins[0] for origin in origins):
            provenance = origins[0]
        return cls(network_name(model), modules, geometry_of(model, modules), counts, provenance, start=starts.pop())

    def check_fingerprint(self, expected: str) -> None:
        """Raises a ValueError if the scales do not have the fingerprint that was stored with them."""
        if self.fingerprint != expected:
            raise ValueError(
                f'{self._source}: the fingerprint of the scales is {self.fingerprint}, expected {expected}. They were '
                f'changed or damaged after they were written; get them again.'
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
            'version': str(_VERSION),
            'architecture': self._architecture,
            'modules': json.dumps(list(self._modules)),
            'geometry': json.dumps({name: str(each) for name, each in self._geometry.items()}),
            'counts': json.dumps(self._counts),
            'fingerprint': self.fingerprint,
            'provenance': json.dumps(self._provenance),
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
        from safetensors.torch import load

        try:
            tensors = load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], 'little')])['__metadata__']
            if (header['format'], header['version']) != (_FORMAT, str(_VERSION)):
                raise ValueError(f'format {header["format"]}, version {header["version"]:.10}, expected {_VERSION}')
            modules: dict[str, dict[str, Tensor]] = {name: {} for name in json.loads(header['modules'])}
            for key, vector in tensors.items():
                name, _, branch = key.rpartition('.')
                modules[name][branch] = vector
            geometry = {name: Geometry.parse(text) for name, text in json.loads(header['geometry']).items()}
            counts, provenance = json.loads(header['counts']), json.loads(header['provenance'])
            start = header.get('start', 'paper')
            scales = cls(header['architecture'], modules, geometry, counts, provenance, source, start)
            expected = header['fingerprint']
        except Exception as error:
            # The libraries raise whatever they meet.
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
            temporary.write_bytes(self.to_bytes())


@dataclass(frozen=True)
class CarriedScales:
    """The scales of a whole network, carried by its convolution `module` as an attribute of the module.

    A module's attribute survives copies, pickling, renaming, wrapping and casts, where a parameter's attribute, its
    position or a buffer's dtype would not. `initialized` says that the weight came from the Rule of Initialization.
    """

    scales: Scales
    module: str
    initialized: bool = False

    def put_on(self, conv: Any) -> None:
        """Lets the convolution carry the scales."""
        conv.repopt_scales = self


def carried_scales(model: nn.Module) -> dict[str, CarriedScales]:
    """Collects the scales that the convolutions of a model carry, by module name."""
    modules = modules_of(model)
    return {name: vars(each)['repopt_scales'] for name, each in modules.items() if 'repopt_scales' in vars(each)}


def drop_scales(conv: nn.Module) -> None:
    """Takes the scales off a convolution, whose weight is another one from now on."""
    vars(conv).pop('repopt_scales', None)


def scales_for(model: nn.Module, scales: ScalesMapping) -> Scales:
    """Makes `Scales` that fit a model of any mapping, with the counts of the model's priors, else 1."""
    if not isinstance(scales, Scales):
        if not isinstance(scales, Mapping) or not all(isinstance(each, Mapping) for each in scales.values()):
            raise ValueError(
                f'Expected Scales or {{module: {{branch: vector}}}}, found {scales!r:.80}. A name or file: '
                f'load_scales(source, model). A prior: Scales.initial(model, prior).'
            )
        priors = carried_priors(unwrap(model))
        counts = {
            name: {branch: priors[name].branches.get(branch, 1) for branch in scales[name]}
            for name in scales
            if name in priors
        }
        scales = Scales('', scales, counts=counts)
    return scales.for_model(model)


def geometry_of(model: nn.Module, names: Mapping[str, object]) -> dict[str, Geometry]:
    """Reads the geometry of the named convolutions, plain or CSLA, in the order of the model's modules."""
    convs = [(name, each) for name, each in modules_of(model).items() if isinstance(each, nn.Conv2d)]
    return {name: Geometry.of(conv, first=index == 0) for index, (name, conv) in enumerate(convs) if name in names}


def _checked(vectors: Mapping[str, Tensor], counts: Mapping[str, int], geometry: Geometry | None) -> dict[str, Tensor]:
    """Returns copies of the vectors of one convolution in float32, sorted by name, if they fit counts and geometry."""
    if unknown := set(counts) - set(vectors):
        raise ValueError(f"there is a count of the branch '{min(unknown)}', but no scale")
    # Any window may fit an unknown kernel.
    channels = geometry.out_channels if geometry else max((each.numel() for each in vectors.values()), default=0)
    make_branches(counts, geometry or Geometry(None, channels, (2**31 - 1, 2**31 - 1), (1, 1), 1))
    found: dict[str, Tensor] = {}
    for branch, vector in sorted(vectors.items()):
        here = f"the scale of branch '{branch}'"
        if vector.is_complex() or vector.shape != (channels,):
            raise ValueError(f'{here} is {vector.dtype} of shape {tuple(vector.shape)}, expected {channels} numbers.')
        exact = found[branch] = vector.detach().to('cpu', torch.float32, copy=True)
        for channel in exact.isfinite().logical_not().nonzero().flatten().tolist():
            raise ValueError(f'{here} is {exact[channel].item()} at channel {channel}. Take an earlier checkpoint.')
        if branch != 'identity' and not exact.any():
            raise ValueError(f'{here} is all zeros, so the branch would never train.')
    return found
