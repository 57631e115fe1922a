"""Prints the README's table of networks: what branches cost in training, in parameters and MACs; builds no weights.

python docs/figures/networks.py
"""

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import repopt_timm  # noqa: F401

NETWORKS = {
    'repopt_vgg_a0': 'repvgg_a0',
    'repopt_vgg_b1': 'repvgg_b1',
    'repopt_vgg_l1': 'repopt_vgg_l1_branches',
    'repopt_mobileone_s0': 'mobileone_s0',
    'repopt_mobileone_s1': 'mobileone_s1',
    'repopt_mobileone_s4': 'mobileone_s4',
    'repopt_repvit_m1': 'repvit_m1',
    'repopt_repghostnet_100': 'repghostnet_100',
    'repopt_ghostnetv3_100': 'ghostnetv3_100',
    'repopt_fastvit_t8': 'fastvit_t8',
    'repopt_lcnetv2_base': 'lcnetv2_base',
}
"""Plain network to the multi-branch network whose prior it has."""


def millions(model: nn.Module) -> tuple[float, float]:
    """Returns parameters and multiply-adds at 224 px, in millions."""
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device='meta'))
    return sum(param.numel() for param in model.parameters()) / 1e6, counter.get_total_flops() / 2e6


def main() -> None:
    """Prints the table."""
    print('| network | parameters | MACs | in training with branches: `timm` model | parameters | MACs |')
    print('|---|---:|---:|---|---:|---:|')
    for plain, branches in NETWORKS.items():
        cells = []
        for name in (plain, branches):
            with torch.device('meta'):
                model = timm.create_model(name).eval()
            parameters, macs = millions(model)
            cells += [f'`{name}`', f'{parameters:.1f} M', f'{macs:,.0f} M']
        print(f'| {" | ".join(cells)} |')


if __name__ == '__main__':
    main()
