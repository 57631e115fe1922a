import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from ..helpers import relative_difference
from .equivalence import optimizers, twins

PROCESSES = 2


def train_in_process(rank, rendezvous, results):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{rendezvous}', rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    csla, plain = twins()
    # Wrapped before the optimizer is made: it has to find the scales inside.
    wrapped = [DistributedDataParallel(csla), DistributedDataParallel(plain)]
    pair = optimizers(*wrapped, 'sgd', lr=0.01, momentum=0.9, weight_decay=5e-3)
    torch.manual_seed(rank)
    for _ in range(50):
        images, labels = torch.randn(8, 3, 32, 32, dtype=torch.float64), torch.randint(0, 5, (8,))
        for net, optimizer in zip(wrapped, pair):
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
    torch.save(relative_difference(plain, csla.to_plain()), f'{results}/{rank}')
    dist.destroy_process_group()


@pytest.mark.slow
def test_the_equivalence_holds_in_two_processes(tmp_path):
    mp.spawn(train_in_process, (tmp_path / 'rendezvous', tmp_path), nprocs=PROCESSES)
    for rank in range(PROCESSES):
        assert torch.load(tmp_path / str(rank)) < 1e-12
