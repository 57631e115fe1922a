import pytest
import timm

from repopt_timm import plain_twin, report_twin

from .block_examples import images, randomized

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


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in NETWORKS if timm.is_model(name)])
def test_the_plain_twin_of_each_family_computes_what_the_network_does(name):
    original = randomized(timm.create_model(name, num_classes=5).double())
    twin = plain_twin(original, weights=True)
    assert sum(bool(row.branches) for row in report_twin(original)) == NETWORKS[name]
    x = images(size=64)
    assert ((twin(x) - original(x)).norm() / original(x).norm()).item() < 1e-10
