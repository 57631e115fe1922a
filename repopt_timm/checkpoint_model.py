"""The model of a run's checkpoint."""

import os
from collections.abc import Mapping
from typing import Any

import timm
from timm.utils import reparameterize_model
from torch import nn

from .checkpoints.read import check_weights, read_checkpoint, select_state_dict
from .datasets import color_mode, data_config_of
from .errors import explaining
from .models import ensure_registered
from .names import ModelName
from .reparam import branches_of, kind_of, prepare
from .scales.scale_files import CHECKPOINT_KEY, searched_scales
from .sources import ScalesSource
from .trained_scales import arguments_of, find_scales
from .weights_origin import restore_origin


def model_from_checkpoint(
    path: str | os.PathLike,
    scales: ScalesSource | None = None,
    need_scales: bool = True,
    checkpoint: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Creates the model of a run's checkpoint, with its weights, and its data configuration in `pretrained_cfg`.

    A target that was trained with scales is refused if none are given or found, because its training could not
    continue; `need_scales=False` accepts it. The checkpoint of an `_hs` or `_csla` model has its own. `checkpoint` is
    the content of `path` if it was read already.
    """
    source = os.fspath(path)
    checkpoint = read_checkpoint(path) if checkpoint is None else checkpoint
    with explaining(f"'{source}' does not hold the model of a run"):
        args = arguments_of(checkpoint)
        name = checkpoint.get('arch')
        if not isinstance(name, str):
            raise ValueError(f"{source} does not name its model (no 'arch', as the training command writes it).")
        ensure_registered(name)
        state = select_state_dict(checkpoint)
        check_weights(state, source)
        # The file itself holds the scales; a path in its arguments could name anything.
        kwargs = {key: value for key, value in (args.get('model_kwargs') or {}).items() if key != 'scales'}
        if ModelName.parse(name).kind == 'hs':
            kwargs['scales'] = searched_scales(checkpoint, source)
        classifier = timm.get_pretrained_cfg_value(name, 'classifier')
        if isinstance(classifier, tuple | list):  # of a distilled network
            classifier = classifier[0]
        if f'{classifier}.weight' in state:
            kwargs['num_classes'] = len(state[f'{classifier}.weight'])
        if args.get('gp'):
            kwargs['global_pool'] = args['gp']
        if channels := args.get('in_chans') or (args.get('input_size') or [None])[0]:
            kwargs['in_chans'] = channels
        model: Any = timm.create_model(name, **kwargs)
        if 'scales' in kwargs:
            model.scales_provenance = kwargs['scales'].provenance
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            if state.keys() == reparameterize_model(model.eval()).state_dict().keys() != model.state_dict().keys():
                raise ValueError(
                    f'{source}: its {name} is already fused: there are no branches to merge or to read scales from. '
                    f'Name the checkpoint of its training.'
                ) from None
            raise ValueError(f'{source}: its weights do not fit {name}: {error}') from None
        for branches in filter(None, map(branches_of, model.modules())):
            # No tensor states it.
            branches.start = (checkpoint.get(CHECKPOINT_KEY) or {}).get('start', 'paper')
        wanted = kind_of(model) == 'target' and (need_scales or scales is not None)
        if wanted and (found := find_scales(checkpoint, model, source, scales)):
            prepare(model, found, init=False)
        data, names = data_config_of(args, model), checkpoint.get('label_names')
        if mode := args.get('input_img_mode'):
            color_mode(data['input_size'][0], mode)
        model.pretrained_cfg = {**model.pretrained_cfg, **data, 'num_classes': model.num_classes, 'label_names': names}
        for key in ('tag', 'test_input_size', 'test_crop_pct', 'test_pool_size'):
            # These describe weights that timm publishes.
            model.pretrained_cfg.pop(key, None)
        if 'origin' in checkpoint or not args.get('pretrained'):
            # timm's script does not state it; it fine-tunes what timm knows for the model.
            restore_origin(model, checkpoint.get('origin'))
        return model.eval()
