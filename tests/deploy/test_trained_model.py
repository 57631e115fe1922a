from argparse import Namespace

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


@pytest.mark.parametrize('name', [TINY, f'{TINY}_hs', f'{TINY}_csla', 'repvgg_a0'])
def test_branches_become_plain_convolutions(name, tmp_path):
    kwargs = {'scales': random_scales()} if name.startswith(f'{TINY}_') else {}
    model = trained(name, **kwargs) if TINY in name else timm.create_model(name, num_classes=3).eval()
    loaded = load_model(write_checkpoint(model, tmp_path / 'last.pth.tar'))
    assert_same_function(loaded, model)
    layers = {type(module) for module in loaded.modules() if not list(module.children())}
    assert layers <= {nn.Conv2d, nn.ReLU, nn.Linear, nn.Identity, nn.AdaptiveAvgPool2d, nn.Dropout, nn.Flatten}
    assert not any('scale' in name for name in loaded.state_dict())


def test_a_checkpoint_of_another_timm_model_tells_its_arguments_and_data(tmp_path):
    model = timm.create_model('test_vit', num_classes=3, img_size=32).eval()
    args = Namespace(**vars(ARGS), model_kwargs={'img_size': 32})
    loaded = load_model(write_checkpoint(model, tmp_path / 'last.pth.tar', args=args))
    assert loaded.num_classes == 3
    assert loaded.pretrained_cfg['input_size'] == (3, 32, 32) and loaded.pretrained_cfg['mean'] == (0.5, 0.4, 0.3)
    assert_same_function(loaded, model)


def test_the_twin_in_a_folder_or_repository_is_the_one_that_its_config_names(tmp_path, client):
    model = save_unknown_twin('test_convnext2', tmp_path / 'folder')
    assert_same_function(load_model(tmp_path / 'folder'), model)
    model = save_unknown_twin('test_convnext3', tmp_path / 'published')
    HfApi().create_repo('ann/mine')
    HfApi().upload_folder(repo_id='ann/mine', folder_path=tmp_path / 'published')
    assert_same_function(load_model('hf-hub:ann/mine'), model)
