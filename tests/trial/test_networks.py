import json

import pytest
import torch

from repopt_timm.trial import networks
from repopt_timm.trial.networks import NETWORKS_FILE, measure_networks, read_networks

from .conftest import fake_run

ARMS = ['--arms', 'sgd', 'init', 'repopt', '--lr', '0.1', '--batch-size', '4', '--input-size', '3', '32', '32']


def test_arms_of_the_same_network_share_its_numbers(trial, caplog):
    runs = trial(*ARMS)
    with caplog.at_level('INFO'):
        measure_networks(runs, 10, torch.device('cpu'))
    numbers = read_networks(runs.folder)
    assert list(numbers) == ['sgd', 'init', 'repopt']
    assert numbers['sgd'] == numbers['init'] == numbers['repopt'] and numbers['sgd']['step_seconds'] > 0
    assert 'Measures training steps on cpu, 4 images of (3, 32, 32)' in caplog.text


def test_numbers_hold_once_something_has_trained(trial):
    runs = trial(*ARMS)
    old = {arm: {'step_seconds': 0} for arm in runs.settings.arms}
    (runs.folder / NETWORKS_FILE).write_text(json.dumps(old))
    measure_networks(runs, 10, torch.device('cpu'))
    assert all(numbers['step_seconds'] > 0 for numbers in read_networks(runs.folder).values())
    fake_run(runs.training('sgd', 0, 0.1), 50)
    (runs.folder / NETWORKS_FILE).write_text(json.dumps(old))
    measure_networks(runs, 10, torch.device('cpu'))
    assert read_networks(runs.folder) == old


@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_a_step_is_measured_where_the_runs_train_in_their_layout(trial, monkeypatch, device):
    found = []

    def training_step(model, images, labels, precision):
        kernels = [parameter for parameter in model.parameters() if parameter.ndim == 4]
        found.extend([images, labels, *kernels])
        return lambda: None

    monkeypatch.setattr(networks, 'training_step', training_step)
    measure_networks(trial(*ARMS, '--channels-last'), 10, torch.device(device))
    assert {tensor.device.type for tensor in found} == {device}
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in found if each.ndim == 4)
