import json

import pytest
import torch
from torch import nn

from repopt_timm.trial.networks import activation_bytes, measure_networks, read_networks

from .conftest import fake_run

OLD = {'parameters': 1, 'convolutions': 1, 'activations': 1, 'step_seconds': 0}


def test_numbers_are_measured_once_for_each_network_until_something_has_trained(trial):
    made = trial('--arms', 'sgd', 'init', '--lr', '0.1', '--batch-size', '4', '--input-size', '3', '32', '32')

    def measured():
        (made.folder / 'networks.json').write_text(json.dumps(dict.fromkeys(made.settings.arms, OLD)) + '\n')
        measure_networks(made, 10, torch.device('cpu'))
        return read_networks(made)

    found = measured()
    assert list(found) == ['sgd', 'init']
    assert found['sgd'] == found['init'] and found['sgd']['step_seconds'] > 0
    fake_run(made.training('sgd', 0, 0.1), 50)
    assert measured()['sgd'] == OLD


@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
def test_saved_memory_counts_once_and_without_parameters_and_inputs(dtype):
    model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.ReLU(), nn.Linear(100, 7, bias=False))
    images, labels = torch.randn(50, 100), torch.randint(7, (50,))
    size = 4 if dtype is None else 2
    # The second layer saves what the ReLU saves, and the loss the logarithms of its probabilities, in float32.
    cast = 0 if dtype is None else 100 * size
    assert activation_bytes(model, images, labels, dtype) == pytest.approx(100 * size + 7 * 4 + cast, abs=30)
