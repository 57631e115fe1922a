from argparse import Namespace
from types import SimpleNamespace

import torch
from torch.utils.data import DataLoader, TensorDataset

from repopt_timm.train import engine

from ..helpers import tiny_model


def test_progress_names_the_time_left_of_the_epoch_and_of_the_run(monkeypatch, capsys):
    # One second for each look at the clock.
    clock = iter(range(1000))
    monkeypatch.setattr(engine.time, 'perf_counter', lambda: float(next(clock)))
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # Of ten epochs four were done before this process, which is a hundred seconds into its first.
    state = engine.TrainState(model, optimizer, None, start=-100.0, first_epoch=4)
    args = Namespace(
        total_epochs=10, grad_accum_steps=1, log_interval=1, rank=0, world_size=1, device='cpu', distributed=False
    )
    args.channels_last = False
    data = DataLoader(TensorDataset(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])), batch_size=2)
    loaders = SimpleNamespace(train=data, mixup=None)
    engine.train_one_epoch(state, loaders, torch.nn.CrossEntropyLoss(), None, torch.enable_grad, 4, args)
    lines = capsys.readouterr().out.splitlines()
    # Half of the first of six epochs took 102 s, all of it 105 s.
    assert [line[line.index('ETA') :] for line in lines] == ['ETA 3s, run ETA 0:18:42', 'ETA 0s, run ETA 0:08:45']
