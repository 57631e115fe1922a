import argparse

import pytest
import torch

from repopt_timm import Scales
from repopt_timm.cards.repository import save_scales_card
from repopt_timm.checkpoint_model import model_from_checkpoint
from repopt_timm.optim import build_repopt_sgd
from repopt_timm.reparam import carried_scales

from .helpers import TINY, random_scales, tiny_model


@pytest.fixture
def scales(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scales = random_scales()
    scales.save('mine.safetensors')
    save_scales_card(scales, 'mine')
    random_scales().save('other.safetensors')
    return scales


def write_checkpoint(scales, args):
    model = tiny_model(scales=scales)
    state = build_repopt_sgd(model, scales, lr=0.1).state_dict()
    content = {'arch': TINY, 'state_dict': model.state_dict(), 'optimizer': state, 'args': argparse.Namespace(**args)}
    torch.save(content, 'last.pth.tar')
    return 'last.pth.tar'


@pytest.mark.parametrize(
    'args',
    [
        {'model_kwargs': {'scales': 'mine.safetensors'}},
        {'scales': 'mine.safetensors', 'model_kwargs': {}},
        {'scales': None, 'model': 'local-dir:mine'},
    ],
    ids=["timm's script", 'ours', 'weights of a repository'],
)
def test_scales_are_found_where_the_arguments_of_a_run_say(scales, args):
    assert Scales.from_model(model_from_checkpoint(write_checkpoint(scales, args))) == scales


@pytest.mark.parametrize(
    ('args', 'name'),
    [
        ({}, '--scales'),
        ({'model_kwargs': {'scales': 'gone.pth'}}, r'gone\.pth'),
        ({'scales': 'other.safetensors'}, r'trained with the scales [0-9a-f]{64}'),
        ({'scales': {'a': 1}}, '--scales'),
        ({'model': 'local-dir:gone'}, 'gone'),
    ],
)
def test_scales_that_are_not_found_are_named(scales, args, name):
    path = write_checkpoint(scales, args)
    with pytest.raises(ValueError, match=rf'last\.pth\.tar: .*{name}'):
        model_from_checkpoint(path)
    assert not carried_scales(model_from_checkpoint(path, need_scales=False))
    assert Scales.from_model(model_from_checkpoint(path, scales)) == scales
