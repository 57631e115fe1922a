import pytest
import torch

import repopt_timm  # noqa: F401  (registers models and optimizers)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope='session')
def one_thread():
    # Networks this small run no faster on more, and much slower on a busy machine.
    torch.set_num_threads(1)
