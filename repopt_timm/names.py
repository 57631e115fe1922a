"""Names of models: architecture, kind and tag."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from .architectures import ARCHITECTURES

KINDS = {'hs': '_hs', 'csla': '_csla', 'branches': '_branches', 'target': ''}
"""Kind of model to the end of its name.

`hs` Hyper-Search, `csla` constant scales, `branches` the multi-branch original, which an ordinary optimizer trains, and
`target` the plain network that is trained and deployed.
"""

PREFIX = 'repopt_'

MULTI_BRANCH = (
    'fastvit_*',
    'ghostnetv3_*',
    'lcnetv2_*',
    'mobileone_*',
    'repghostnet_*',
    'repvgg_b*g4',
    'repvgg_d2se',
    'repvit_*',
)
"""timm's names of multi-branch networks whose plain twins are registered at import, with `repopt_` in front.

A RepVGG without groups is `repopt_vgg_*`. RepVGG-D2se applies squeeze-and-excitation before the ReLU, ours after it.
"""


@dataclass(frozen=True)
class ModelName:
    """A name such as `repopt_vgg_a0_hs.cifar10`: plain network, kind, and tag of weights."""

    architecture: str
    kind: str = 'target'
    tag: str = ''

    @classmethod
    def parse(cls, text: str) -> 'ModelName':
        """Takes a name apart; a name that is not one of this package is a target's."""
        name, _, tag = text.partition('.')
        kind = next(kind for kind, suffix in KINDS.items() if name.endswith(suffix))
        return cls(name.removesuffix(KINDS[kind]), kind, tag)

    @property
    def variant(self) -> str:
        """The name without a tag, as timm's registry has it."""
        return self.of_kind(self.kind)

    @property
    def network(self) -> str:
        """The network's name in scales: the architecture; of a converted timm model, timm's own name for it."""
        return self.architecture if self.architecture in ARCHITECTURES else self.architecture.removeprefix(PREFIX)

    @property
    def is_registered_at_import(self) -> bool:
        """Whether `import repopt_timm` makes the name known to timm, without `register_twins`."""
        twin = self.architecture != self.network
        return not twin or any(fnmatchcase(self.network, pattern) for pattern in MULTI_BRANCH)

    def of_kind(self, kind: str) -> str:
        """Returns the name of the architecture's model of another kind, without a tag."""
        return self.architecture + KINDS[kind]
