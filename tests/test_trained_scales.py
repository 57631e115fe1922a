import argparse

import pytest
import torch

from repopt_timm.cards.publish import save_scales_card
from repopt_timm.checkpoint_model import model_from_checkpoint
from repopt_timm.optim import build_repopt_sgd

from .helpers import TINY, random_scales, tiny_model


@pytest.fixture
def scales(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scales = random_scales()
    scales.save('mine.safetensors')
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
    [{'model_kwargs': {'scales': 'mine.safetensors'}}, {'scales': 'mine.safetensors', 'model_kwargs': {}}],
    ids=["timm's script", 'ours'],
)
def test_scales_are_found_where_the_arguments_of_a_run_say(scales, args):
    assert model_from_checkpoint(write_checkpoint(scales, args)).scales == scales


@pytest.mark.parametrize('model', ['local-dir:mine', None], ids=['repository', 'shipped'])
def test_scales_are_found_where_the_weights_came_from(scales, model, monkeypatch, tmp_path):
    save_scales_card(scales, tmp_path / 'mine')
    if model is None:
        monkeypatch.setattr('repopt_timm.sources.shipped_repositories', lambda: {f'{TINY}.mine': tmp_path / 'mine'})
    path = write_checkpoint(scales, {'scales': None, 'model': model or TINY})
    assert model_from_checkpoint(path).scales == scales


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ({}, r'last\.pth\.tar: its model was trained with scales, .* Name the scales of the run \(.*--scales\)\.$'),
        ({'model_kwargs': {'scales': 'gone.pth'}}, 'It says scales=gone.pth, which does not help: No scales found at'),
        ({'scales': 'other.safetensors'}, r'It says scales=other\.safetensors, .*: it was trained with the scales'),
        ({'scales': {'a': 1}}, r'--scales\)\.$'),
        ({'model': TINY}, 'It says model=test_repopt_vgg, .* none ship for it'),
        ({'model': 'local-dir:gone'}, 'It says model=local-dir:gone, .* No scales found at'),
        ({'model': 'odd:name'}, r'It says model=odd:name, which does not help'),
    ],
)
def test_what_is_missing_is_named(scales, args, message):
    path = write_checkpoint(scales, args)
    with pytest.raises(ValueError, match=message):
        model_from_checkpoint(path)
    assert model_from_checkpoint(path, need_scales=False).scales is None
    assert model_from_checkpoint(path, scales).scales == scales
