"""CSLA networks trained with SGD, and plain ones with RepOptSGD, are the same: for the blocks of each family."""

import copy

import pytest
import torch
from torch import Tensor, nn

from repopt_timm import RepOptAdamW, RepOptSGD, Scales, clip_grad_norm_, csla, make_grad_mults, plain_twin, to_plain
from repopt_timm.reparam import initialize

from ..helpers import relative_difference, spread
from .block_examples import examples, images

EXAMPLES = examples()
SGD = {'lr': 0.01, 'momentum': 0.9, 'weight_decay': 5e-3}


@pytest.mark.parametrize('name', EXAMPLES)
def test_a_csla_block_under_sgd_is_the_plain_block_under_rep_opt_sgd(name):
    # Merged weights leave no parameter at zero, of which a relative difference would say nothing.
    plain = plain_twin(EXAMPLES[name].block, weights=True)
    twin = csla(plain, spread(Scales.initial(plain)))
    plain = to_plain(twin)
    start = copy.deepcopy(plain)
    optimizers = [torch.optim.SGD(twin.parameters(), **SGD)]
    optimizers.append(RepOptSGD(plain.parameters(), grad_mults=make_grad_mults(plain), **SGD))
    for _ in range(5):
        x = images(EXAMPLES[name].channels)
        for net, optimizer in zip((twin, plain), optimizers):
            optimizer.zero_grad()
            net(x).sin().mean().backward()
            optimizer.step()
    assert relative_difference(plain, to_plain(twin)) < 1e-10
    assert relative_difference(plain, start) > 1e-4


class SeparateBranches(nn.Module):
    """Three k x k convolutions and a 1x1 one with constant scales, and a trained depthwise identity: written out."""

    def __init__(self, channels: int, scales: dict[str, Tensor]):
        super().__init__()
        self.kxk = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(3))
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.identity = nn.Parameter(scales['identity'].clone())
        self.scales = {name: vector.view(1, -1, 1, 1) for name, vector in scales.items()}

    def forward(self, x: Tensor) -> Tensor:
        total = self.scales['1x1'] * self.pointwise(x) + self.identity.view(1, -1, 1, 1) * x
        for conv in self.kxk:
            total = total + self.scales['kxk'] * conv(x)
        return total

    def kernel(self) -> Tensor:
        kernel = self.scales['kxk'].view(-1, 1, 1, 1) * sum(conv.weight for conv in self.kxk)
        kernel[:, :, 1:2, 1:2] += self.scales['1x1'].view(-1, 1, 1, 1) * self.pointwise.weight
        kernel[:, :, 1, 1] += torch.diag(self.identity)
        return kernel


def scales_of_three():
    vectors = {name: torch.randn(6) for name in ('kxk', '1x1', 'identity')}
    return Scales('', {'0': vectors}, counts={'0': {'kxk': 3}})


@pytest.mark.parametrize(
    ('ordinary', 'ours', 'rule', 'tolerance'),
    [
        (torch.optim.SGD, RepOptSGD, 'sgd', 1e-12),
        # Adam's eps would tell branches apart by the size of their gradients.
        (torch.optim.AdamW, RepOptAdamW, 'adamw', 1e-9),
    ],
)
@pytest.mark.parametrize('max_norm', [None, 0.5])
def test_a_count_trains_like_as_many_separate_branches(ordinary, ours, rule, tolerance, max_norm):
    scales = scales_of_three()
    separate = SeparateBranches(6, {name: each.double() for name, each in scales['0'].items()}).double()
    plain = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False)).double()
    with torch.no_grad():
        plain[0].weight.copy_(separate.kernel())
    kwargs = SGD if rule == 'sgd' else {'lr': 1e-3, 'weight_decay': 0.05, 'eps': 1e-30}
    optimizers = [ordinary(separate.parameters(), **kwargs)]
    optimizers.append(ours(plain.parameters(), grad_mults=make_grad_mults(plain, scales, rule), **kwargs))
    clipping = make_grad_mults(plain, scales)
    for _ in range(30):
        x = images(6)
        for net, optimizer in zip((separate, plain), optimizers):
            optimizer.zero_grad()
            net(x).sin().square().mean().backward()
        if max_norm is not None:
            norm = nn.utils.clip_grad_norm_(separate.parameters(), max_norm)
            torch.testing.assert_close(clip_grad_norm_(plain.parameters(), max_norm, clipping), norm)
        for optimizer in optimizers:
            optimizer.step()
    assert ((plain[0].weight - separate.kernel()).norm() / plain[0].weight.norm()).item() < tolerance


def test_a_count_starts_like_the_sum_of_as_many_branches():
    scales = {name: torch.full((64,), 0.5) for name in ('kxk', '1x1', 'identity')}
    scales = Scales('', {'0': scales}, counts={'0': {'kxk': 3}})
    plain = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=False))
    initialize(plain, scales)
    expected = SeparateBranches(64, scales['0']).kernel()
    levels = torch.linspace(0.05, 0.95, 19)
    kernels = (plain[0].weight.detach(), expected.detach())
    drawn, summed = (torch.cat([each[:, :, 0], each[:, :, 2]]).flatten().quantile(levels) for each in kernels)
    # 24576 draws each. A count of 2 or 4, or one draw times 3, would be off by 0.19 and more.
    assert ((drawn - summed).abs().max() / summed.std()).item() < 0.06
