"""Prints the README's table of networks: what branches cost in training, in parameters and MACs; builds no weights.

python docs/figures/networks.py
"""

import timm
import torch

import repopt_timm  # noqa: F401
from repopt_timm.model_size import count_macs, count_parameters

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

TRAINING_TIME = {
    'repopt_vgg_a0': 1.41,
    'repopt_vgg_b1': 1.41,
    'repopt_mobileone_s0': 4.42,
    'repopt_mobileone_s1': 1.73,
    'repopt_mobileone_s4': 1.45,
}
"""Time of a training step with branches, divided by the plain network's; measured in docs/performance.md."""


def main() -> None:
    """Prints the table."""
    print('| network | parameters | MACs | trained with branches | parameters | MACs | step time |')
    print('|---|---:|---:|---|---:|---:|---:|')
    for plain, branches in NETWORKS.items():
        cells = []
        for name in (plain, branches):
            with torch.device('meta'):
                model = timm.create_model(name)
            macs = count_macs(model, (3, 224, 224))
            assert macs is not None
            cells += [f'`{name}`', f'{count_parameters(model) / 1e6:.1f} M', f'{macs / 1e6:,.0f} M']
        cells.append(f'{TRAINING_TIME[plain]:.1f} x' if plain in TRAINING_TIME else '')
        print(f'| {" | ".join(cells)} |')


if __name__ == '__main__':
    main()
