import pytest
import torch
import torch.nn.functional as F
from timm.layers import freeze_batch_norm_2d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from repopt_timm import clip_grad_norm_, make_grad_mults
from repopt_timm.optim import RepOptAdamW, RepOptSGD
from repopt_timm.reparam import attach_scales

from ..helpers import relative_difference
from ..processes import in_processes
from .equivalence import optimizers, twins

GLOBAL_BATCH = 8
SETTINGS = {'lr': 0.01, 'momentum': 0.9, 'weight_decay': 5e-3}


def batches(steps=20, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        images = torch.randn(GLOBAL_BATCH, 3, 32, 32, dtype=torch.float64, generator=generator)
        yield images, torch.randint(0, 5, (GLOBAL_BATCH,), generator=generator)


def fixed_net():
    """A plain net with scales and frozen BatchNorm: what one sample does not depend on the others."""
    return freeze_batch_norm_2d(twins()[1])


def train(net, optimizer, rank=0, count=1, clip=None):
    for images, labels in batches():
        optimizer.zero_grad()
        F.cross_entropy(net(images[rank::count]), labels[rank::count]).backward()
        if clip is not None:
            clip()
        optimizer.step()


def equivalence_under_ddp(rank, count):
    csla, plain = twins()
    # Wrapped before the optimizer is made: it has to find the scales inside.
    wrapped = [DistributedDataParallel(csla), DistributedDataParallel(plain)]
    for net, optimizer in zip(wrapped, optimizers(*wrapped, 'sgd', **SETTINGS)):
        train(net, optimizer, rank, count)
    return relative_difference(plain, csla.to_plain())


def ddp_against_one_process(rank, count):
    torch.manual_seed(0)
    nets = fixed_net(), fixed_net()
    nets[1].load_state_dict(nets[0].state_dict())
    attach_scales(nets[1], nets[0].scales)
    train(nets[0], RepOptSGD(nets[0].parameters(), grad_mults=make_grad_mults(nets[0]), **SETTINGS))
    spread = DistributedDataParallel(nets[1])
    train(spread, RepOptSGD(spread.parameters(), grad_mults=make_grad_mults(spread), **SETTINGS), rank, count)
    return relative_difference(*nets)


def fsdp_against_one_process(rank, count, rule, kwargs):
    torch.manual_seed(0)
    net, sharded = fixed_net(), fixed_net()
    sharded.load_state_dict(net.state_dict())
    attach_scales(sharded, net.scales)
    mesh = init_device_mesh('cpu', (count,))
    for stage in sharded.stages:
        fully_shard(stage, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for each, part in ((net, (0, 1)), (sharded, (rank, count))):
        mults = make_grad_mults(each, update_rule=rule)
        clipping = make_grad_mults(each)
        optimizer = {'sgd': RepOptSGD, 'adamw': RepOptAdamW}[rule](each.parameters(), grad_mults=mults, **kwargs)
        params = list(each.parameters())
        train(each, optimizer, *part, clip=lambda params=params, mults=clipping: clip_grad_norm_(params, 0.5, mults))
    whole = {name: param.full_tensor() for name, param in sharded.named_parameters()}
    return max((whole[name] - param).abs().max().item() for name, param in net.named_parameters())


def under_ddp(rank, count):
    return equivalence_under_ddp(rank, count), ddp_against_one_process(rank, count)


def under_fsdp(rank, count):
    return {
        'sgd': fsdp_against_one_process(rank, count, 'sgd', {**SETTINGS, 'nesterov': True}),
        'adamw': fsdp_against_one_process(rank, count, 'adamw', {'lr': 1e-3, 'weight_decay': 0.05}),
    }


@pytest.mark.slow
@pytest.mark.parametrize('count', [2, 4])
def test_the_equivalence_holds_in_parallel_and_frozen_batchnorm_makes_processes_follow_one(count, tmp_path):
    for to_csla, to_one_process in in_processes(count, under_ddp, tmp_path):
        assert to_csla < 1e-12
        assert to_one_process < 1e-12


@pytest.mark.slow
def test_sharded_parameters_follow_one_process(tmp_path):
    for differences in in_processes(2, under_fsdp, tmp_path):
        assert all(difference < 1e-10 for difference in differences.values()), differences
