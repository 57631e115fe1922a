import pytest
import timm
import torch
from huggingface_hub import HfApi
from torch import nn

from repopt_timm.deploy import load_model

from ..helpers import TINY, random_scales, save_unknown_twin
from .conftest import ARGS, trained, write_checkpoint

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def assert_same_function(first, second):
    with torch.inference_mode():
        torch.testing.assert_close(first(IMAGES), second(IMAGES), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('kind', ['', '_hs', '_csla'])
def test_every_kind_of_repopt_vgg_becomes_plain_convolutions(kind, tmp_path):
    model = trained(TINY + kind, **({'scales': random_scales()} if kind else {}))
    loaded = load_model(write_checkpoint(model, tmp_path / 'last.pth.tar'))
    assert_same_function(loaded, model)
    layers = {type(module) for module in loaded.modules() if not list(module.children())}
    assert layers <= {nn.Conv2d, nn.ReLU, nn.Linear, nn.Identity, nn.AdaptiveAvgPool2d, nn.Dropout, nn.Flatten}
    assert not any('scale' in name for name in loaded.state_dict())


def test_a_repvgg_is_reparameterized(tmp_path):
    model = timm.create_model('repvgg_a0', num_classes=3).eval()
    model.stem.conv_kxk.bn.running_mean.normal_()
    loaded = load_model(write_checkpoint(model, tmp_path / 'last.pth.tar'))
    assert_same_function(loaded, model)
    assert len([module for module in loaded.modules() if isinstance(module, nn.Conv2d)]) == 22


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_checkpoints_of_other_timm_models_tell_their_number_of_classes(name, tmp_path):
    kwargs = {'img_size': 32} if name == 'test_vit' else {}
    model = timm.create_model(name, num_classes=3, **kwargs).eval()
    args = {**vars(ARGS), 'model_kwargs': kwargs}
    loaded = load_model(write_checkpoint(model, tmp_path / 'last.pth.tar', args=type(ARGS)(**args)))
    assert loaded.num_classes == 3
    assert loaded.pretrained_cfg['input_size'] == (3, 32, 32)
    assert loaded.pretrained_cfg['mean'] == (0.5, 0.4, 0.3)
    assert_same_function(loaded, model)


def test_the_twin_in_a_folder_or_repository_is_the_one_that_its_config_names(tmp_path, client):
    model = save_unknown_twin('test_convnext2', tmp_path / 'folder')
    assert_same_function(load_model(tmp_path / 'folder'), model)
    model = save_unknown_twin('test_convnext3', tmp_path / 'published')
    HfApi().create_repo('ann/mine')
    HfApi().upload_folder(repo_id='ann/mine', folder_path=tmp_path / 'published')
    assert_same_function(load_model('hf-hub:ann/mine'), model)


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        ('nowhere/last.pth.tar', 'nowhere/last.pth.tar'),
        ('no_such_model', 'no_such_model'),
        (TINY, 'There are no trained weights'),
        ('empty', 'cannot be made'),
    ],
)
def test_what_cannot_be_loaded_is_named(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty' / 'config.json').write_text('{}')
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        load_model(source)
