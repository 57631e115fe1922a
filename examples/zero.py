"""ZeRO: parameters and momentum are split among the processes of DistributedDataParallel.

torchrun --nproc-per-node 2 examples/zero.py
"""

import timm
import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import repopt_timm


def train(model, loader):
    grad_mults = repopt_timm.make_grad_mults(model)

    def repopt_sgd(groups, **settings):
        # Each process needs the Grad Mults of its share.
        share = [param for group in groups for param in group['params']]
        return repopt_timm.RepOptSGD(groups, grad_mults=grad_mults.of(share), **settings)

    parallel = DistributedDataParallel(model)
    # Groups and momentum of timm's `repopt_sgd`.
    groups = timm.optim.param_groups_weight_decay(model, weight_decay=4e-5)
    optimizer = ZeroRedundancyOptimizer(groups, repopt_sgd, lr=0.05, momentum=0.9, nesterov=True)
    for images, labels in loader:
        loss = torch.nn.functional.cross_entropy(parallel(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == '__main__':
    dist.init_process_group('gloo')
    torch.manual_seed(dist.get_rank())
    images = [(torch.randn(4, 3, 32, 32), torch.arange(4) % 5) for _ in range(3)]
    train(timm.create_model('test_repopt_vgg', scales='initial', num_classes=5), images)
    dist.destroy_process_group()
