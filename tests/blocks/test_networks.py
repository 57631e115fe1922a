import copy

import pytest
import timm
import torch
import torch.nn.functional as F

from repopt_timm import RepOptSGD, Scales, csla, make_grad_mults, plain_twin, report_twin, to_plain

from ..helpers import relative_difference, spread
from .block_examples import images

# The smallest of each family, and the number of its blocks that become plain.
NETWORKS = {
    'fastvit_t8': 10,
    'ghostnetv3_050': 36,
    'lcnetv2_small': 6,
    'mobileone_s0': 43,
    'repghostnet_050': 32,
    'repvgg_a0': 22,
    'repvit_m0_9': 23,
    'repvit_m1': 23,
}


def train(networks, optimizers):
    for _ in range(2):
        x, labels = images(size=64), torch.randint(0, 5, (4,))
        for network, optimizer in zip(networks, optimizers):
            optimizer.zero_grad()
            F.cross_entropy(network(x), labels).backward()
            optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in NETWORKS if timm.is_model(name)])
def test_a_network_of_each_family(name):
    original = timm.create_model(name, num_classes=5).double()
    train([original], [torch.optim.SGD(original.parameters(), lr=0.005)])
    twin = plain_twin(original.eval(), weights=True)
    assert sum(bool(row.branches) for row in report_twin(original)) == NETWORKS[name]
    x = images(size=64)
    assert ((twin(x) - original(x)).norm() / original(x).norm()).item() < 1e-10

    # Evaluation mode freezes BatchNorm, whose chaos on small maps would hide what is tested.
    branches = csla(twin, spread(Scales.initial(twin)))
    plain = to_plain(branches)
    start, settings = copy.deepcopy(plain), {'lr': 1e-5, 'momentum': 0.9, 'weight_decay': 5e-3}
    optimizers = [torch.optim.SGD(branches.parameters(), **settings)]
    optimizers.append(RepOptSGD(plain.parameters(), grad_mults=make_grad_mults(plain), **settings))
    train([branches, plain], optimizers)
    assert relative_difference(plain, to_plain(branches)) < 1e-10
    assert relative_difference(plain, start) > 1e-7
