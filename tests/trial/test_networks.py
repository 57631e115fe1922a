from dataclasses import replace

import pytest
import torch
from torch import nn

from repopt_timm.trial.networks import activation_bytes, measure_networks, read_networks


def test_numbers_are_measured_once_for_each_network(trial):
    made = trial('--arms', 'sgd', 'init', '--lr', '0.1', '--batch-size', '4', '--input-size', '3', '32', '32')
    measure_networks(made, torch.device('cpu'))
    found = read_networks(made)
    assert list(found) == ['sgd', 'init'] and found['sgd'] == found['init'] and found['sgd']['step_seconds'] > 0
    measure_networks(made, torch.device('cpu'))
    assert read_networks(made) == found
    # An arm that is added is measured in turn with the others.
    measure_networks(replace(made, arms=['sgd', 'init', 'dirac']), torch.device('cpu'))
    again = read_networks(made)
    assert again['dirac'] == again['sgd'] == again['init']


@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
def test_saved_memory_counts_once_and_without_parameters_and_inputs(dtype):
    model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.ReLU(), nn.Linear(100, 7, bias=False))
    images, labels = torch.randn(50, 100), torch.randint(7, (50,))
    size = 4 if dtype is None else 2
    # The second layer saves what the ReLU saves, and the loss the logarithms of its probabilities, in float32.
    cast = 0 if dtype is None else 100 * size
    assert activation_bytes(model, images, labels, dtype) == pytest.approx(100 * size + 7 * 4 + cast, abs=30)
