import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import repopt_timm  # noqa: F401  (registers models and optimizers)

from .helpers import write_images
from .hub_server import HubServer, connect_client


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope='session')
def one_thread():
    # Networks this small run no faster on more, and much slower on a busy machine.
    torch.set_num_threads(1)


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    """Two classes of noisy pictures, 24 of each for training and 8 for validation."""
    root = tmp_path_factory.mktemp('images')
    return write_images(root, {'train': 24, 'validation': 8}, {'dark': 60, 'light': 190}, 30)


@pytest.fixture
def shard():
    """Shards a model, over this process alone."""
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh('cpu', (1,))
    yield lambda model: fully_shard(model, mesh=mesh)
    dist.destroy_process_group()


@pytest.fixture
def hub():
    """A Hub on loopback with the users ann and bob."""
    with HubServer() as server:
        yield server


@pytest.fixture
def client(hub, monkeypatch, tmp_path):
    """Makes this process a client of `hub`, ann's at first; call it to change the cache, the user or the mode."""

    def switch(home='home', token='hf_ann', offline=False):
        connect_client(monkeypatch, hub, tmp_path / home, token, offline)

    switch()
    return switch
