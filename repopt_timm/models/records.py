"""What timm records of a model: its name, its first convolution, and the arguments that it was created with."""

import re
from typing import Any

from timm.models import _hub, get_pretrained_cfg
from timm.models._pretrained import PretrainedCfg
from torch import nn

from ..names import ModelName


class Twin(nn.Module):
    """Mixin for timm networks of this package: keeps scales out of timm's records, renames a twin made plain."""

    pretrained_cfg: dict[str, Any]

    def __setattr__(self, name: str, value: Any) -> None:
        # timm's factory records its arguments on the model and writes them to config.json. Scales are data, no setting.
        if name == '_model_args':
            value = {key: each for key, each in value.items() if key != 'scales'}
        super().__setattr__(name, value)

    def note_plain(self) -> None:
        """States that the network is the target now; `to_plain` calls it."""
        take_name(self, ModelName(ModelName.parse(self.pretrained_cfg['architecture']).architecture))


def take_name(model: Any, name: ModelName) -> None:
    """Lets a network be the model called `name`, in timm's records and for its scales; changed in place."""
    first_conv = first_conv_of(get_pretrained_cfg(name.architecture), name.kind)
    model.architecture = name.network
    model.pretrained_cfg = {**model.pretrained_cfg, 'architecture': name.variant, 'first_conv': first_conv}
    model.default_cfg = model.pretrained_cfg
    if hasattr(model, '_traits'):
        model._traits = {**model._traits, 'first_conv': first_conv}


def first_conv_of(config: PretrainedCfg | None, kind: str = 'target') -> Any:
    """Returns the name of what timm adapts to other image channels; None for a twin, see `weights.restore`."""
    given = config.first_conv if config else None
    if not given or kind != 'target':
        return None
    names = [given] if isinstance(given, str) else given
    plain = {re.sub(r'\.conv_(kxk|scale|1x1)\..*', '.conv', each) for each in names}
    return plain.pop() if len(plain) == 1 else tuple(given)


def stated_arguments(model: nn.Module) -> dict[str, Any]:
    """Returns the arguments of `timm.create_model` that a repository has to state; from 1.0.31 on timm does so."""
    if hasattr(_hub, 'get_model_args'):
        return {}
    args: dict[str, Any] = getattr(model, '_model_args', {})
    return {key: each for key, each in args.items() if key != 'num_classes' and not key.endswith('_rate')}
