import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from repopt_timm import RepOptSGD, make_grad_mults, prepare
from repopt_timm.optim.sharding import local_rows

RANK = 1


@pytest.fixture(scope='module')
def mesh():
    """Three processes, of which this one is in the middle; torch caches what it finds out about a mesh."""
    dist.init_process_group('fake', store=FakeStore(), rank=RANK, world_size=3)
    yield init_device_mesh('cpu', (3,))
    dist.destroy_process_group()


def sharded(tensor, mesh):
    return DTensor.from_local(
        tensor.chunk(3)[RANK].clone(), mesh, [Shard(0)], shape=tensor.shape, stride=tensor.stride()
    )


def test_a_process_knows_which_rows_of_a_kernel_it_holds(mesh):
    kernel = torch.randn(10, 4, 3, 3)
    assert local_rows(sharded(kernel, mesh)) == (4, 8)
    whole = DTensor.from_local(kernel, mesh, [Replicate()])
    assert local_rows(whole) == local_rows(kernel) == (0, 10)


def test_a_shard_is_stepped_with_its_own_rows_of_the_grad_mult(mesh):
    model = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, bias=False))
    scales = {'0': {name: torch.rand(12) + 0.5 for name in ('kxk', '1x1', 'identity')}}
    prepare(model, scales)
    kernel, gradient = model[0].weight.detach().clone(), torch.randn(12, 12, 3, 3)
    expected = kernel - make_grad_mults(model)[model[0].weight].dense() * gradient
    model[0].weight = nn.Parameter(sharded(kernel, mesh))
    optimizer = RepOptSGD(model.parameters(), lr=1.0, grad_mults=make_grad_mults(model))
    model[0].weight.grad = sharded(gradient, mesh)
    optimizer.step()
    torch.testing.assert_close(model[0].weight.to_local(), expected.chunk(3)[RANK])
