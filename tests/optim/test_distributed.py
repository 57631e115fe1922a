import pytest
import torch
import torch.nn.functional as F
from timm.layers import freeze_batch_norm_2d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from repopt_timm import Scales, clip_grad_norm_, make_grad_mults, prepare, to_plain

from ..helpers import relative_difference
from ..processes import in_processes
from .equivalence import OURS, SETTINGS, optimizers, twins


def train(net, optimizer, rank=0, count=1, max_norm=None):
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        images = torch.randn(8, 3, 32, 32, dtype=torch.float64, generator=generator)[rank::count]
        labels = torch.randint(0, 5, (8,), generator=generator)[rank::count]
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        if max_norm is not None:
            clip_grad_norm_(net.parameters(), max_norm, make_grad_mults(net))
        optimizer.step()


def fixed_nets():
    """Two equal plain nets with scales and frozen BatchNorm: what one sample does not depend on the others."""
    torch.manual_seed(0)
    nets = [freeze_batch_norm_2d(twins()[1]) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    prepare(nets[1], Scales.from_model(nets[0]), init=False)
    return nets


def made(net, rule):
    return OURS[rule](net.parameters(), grad_mults=make_grad_mults(net, update_rule=rule), **SETTINGS[rule])


def differences(rank, count):
    csla, plain = twins()
    # Wrapped before the optimizer is made: it has to find the scales inside.
    wrapped = [DistributedDataParallel(csla), DistributedDataParallel(plain)]
    for net, optimizer in zip(wrapped, optimizers(*wrapped, 'sgd')):
        train(net, optimizer, rank, count)
    found = {'DDP to CSLA': relative_difference(plain, to_plain(csla))}

    single, spread = fixed_nets()
    train(single, made(single, 'sgd'))
    parallel = DistributedDataParallel(spread)
    train(parallel, made(parallel, 'sgd'), rank, count)
    found['DDP to one process'] = relative_difference(single, spread)

    mesh = init_device_mesh('cpu', (count,))
    for rule in OURS:
        single, sharded = fixed_nets()
        for module in (*sharded.stages, sharded):
            fully_shard(module, mesh=mesh)
        train(single, made(single, rule), max_norm=0.5)
        train(sharded, made(sharded, rule), rank, count, max_norm=0.5)
        whole = {name: param.full_tensor() for name, param in sharded.named_parameters()}
        found[rule] = max((whole[name] - param).abs().max().item() for name, param in single.named_parameters())
    return found


@pytest.mark.slow
def test_in_parallel_the_equivalence_holds_and_ddp_and_sharded_parameters_follow_one_process(tmp_path):
    for found in in_processes(2, differences, tmp_path):
        assert all(difference < 1e-10 for difference in found.values()), found
