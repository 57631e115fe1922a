"""Each script of examples/ runs as it stands."""

import re
import runpy
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

from repopt_timm import Scales
from repopt_timm.optim import RepOptSGD

from .helpers import TINY, relative_difference
from .processes import in_processes

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / 'examples'


@pytest.mark.slow
@pytest.mark.parametrize(
    ('script', 'package'),
    [('lightning_trainer', 'lightning'), ('accelerate_loop', 'accelerate'), ('transformers_trainer', 'transformers')],
)
def test_other_trainers_multiply_gradients(script, package, tmp_path, monkeypatch):
    pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    steps = []
    step = RepOptSGD.step
    # Patch the class, because schedules and Accelerate wrap the step of an instance.
    monkeypatch.setattr(
        RepOptSGD, 'step', lambda self, *args, **kwargs: (steps.append(self), step(self, *args, **kwargs))[1]
    )
    runpy.run_path(str(EXAMPLES / f'{script}.py'), run_name='__main__')
    assert len(steps) == 2
    fingerprint = Scales.from_model(timm.create_model(TINY, scales='initial', num_classes=5)).fingerprint
    assert {group['scales_fingerprint'] for group in steps[0].param_groups} == {fingerprint}


def zero_against_one_process(rank, count):
    train = runpy.run_path(str(EXAMPLES / 'zero.py'))['train']
    data = [(torch.randn(4, 3, 32, 32), torch.arange(4) % 5) for _ in range(3)]
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(timm.create_model(TINY, scales='initial', num_classes=5))
    train(models[0], data)
    optimizer = timm.optim.create_optimizer_v2(models[1], 'repopt_sgd', lr=0.05, weight_decay=4e-5)
    for images, labels in data:
        optimizer.zero_grad()
        F.cross_entropy(models[1](images), labels).backward()
        optimizer.step()
    return relative_difference(*models)


@pytest.mark.slow
def test_zero_follows_one_process(tmp_path):
    assert all(difference < 1e-5 for difference in in_processes(2, zero_against_one_process, tmp_path))


@pytest.mark.slow
def test_a_detector_learns_with_one_of_the_backbones(capsys):
    runpy.run_path(str(EXAMPLES / 'detector.py'))
    first, *_, last = (float(line.rpartition(' ')[2]) for line in capsys.readouterr().out.splitlines())
    assert last < first


@pytest.mark.slow
def test_a_first_look_at_digits_ends_in_an_int8_network(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / 'digits.py'))
    top1 = re.findall(r'^digits/(?:model|int8\.onnx): ([\d.]+) %$', capsys.readouterr().out, re.M)
    assert len(top1) == 2
    assert min(map(float, top1)) > 90
    assert (tmp_path / 'digits/classes-int8/confusion.png').exists()
