import json

import pytest
from torch.optim import SGD

from repopt_timm.cli import main
from repopt_timm.doctor import check_equivalence
from repopt_timm.optim import RepOptSGD

from .helpers import TINY, random_scales

ARGUMENTS = ['doctor', '--model', TINY, '--steps', '2', '--img-size', '32', '--json']


def test_the_users_model_and_scales_are_trained_both_ways(tmp_path, capsys):
    scales = random_scales(strides=(2, 1, 2, 2, 2))
    scales.save(tmp_path / 'mine.safetensors')
    extra = ['--scales', str(tmp_path / 'mine.safetensors'), '--model-kwargs', 'strides=(2,1,2,2,2)', '--device', 'cpu']
    assert main([*ARGUMENTS, *extra]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {'repopt-timm', 'python', 'torch', 'timm', 'cpu'} <= set(found['environment'])
    assert found['check']['scales'] == scales.fingerprint
    assert 0 < found['check']['deviation'] < 1e-13


def test_an_optimizer_that_is_wrong_is_noticed(monkeypatch, capsys):
    monkeypatch.setattr(RepOptSGD, 'step', SGD.step)
    assert main(ARGUMENTS) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)['check']['deviation'] > 1e-3
    assert TINY in captured.err


def test_any_model_of_timm_with_dropout_and_batchnorm_is_checked():
    assert check_equivalence('repopt_test_efficientnet', steps=2, img_size=32, model_kwargs={'drop_rate': 0.5})['right']


def test_a_model_without_a_csla_network_is_refused():
    with pytest.raises(ValueError, match='resnet18'):
        check_equivalence('resnet18')
