"""The blocks of docs/integrations.md, executed as they stand there."""

import re
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

from repopt_timm.optim import RepOptSGD

from .helpers import TINY

PAGE = Path(__file__).parents[1] / 'docs/integrations.md'
BLOCKS = dict(
    re.findall(r'^## (.+?)\n.*?```python\n(.*?)```', PAGE.read_text(encoding='utf-8'), re.DOTALL | re.MULTILINE)
)


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {'pixel_values': torch.full((3, 32, 32), index / 8), 'labels': index % 5}


@pytest.mark.slow
@pytest.mark.parametrize(
    ('title', 'package'),
    [('PyTorch Lightning', 'lightning'), ('Accelerate', 'accelerate'), ('Transformers', 'transformers')],
)
def test_each_block_trains_with_grad_mults(title, package, tmp_path, monkeypatch):
    pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    steps = []
    step = RepOptSGD.step
    # Of the class: schedules and Accelerate wrap that of an instance.
    monkeypatch.setattr(
        RepOptSGD, 'step', lambda self, *args, **kwargs: (steps.append(self), step(self, *args, **kwargs))[1]
    )
    data = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 5)
    names = {'name': TINY, 'num_classes': 5, 'loader': DataLoader(data, batch_size=4), 'dataset': Images()}
    exec(compile(BLOCKS[title], f'{PAGE}: {title}', 'exec'), {**names, 'steps': 2, 'folder': str(tmp_path / 'out')})
    assert len(steps) == 2
    fingerprint = timm.create_model(TINY, scales='initial', num_classes=5).scales.fingerprint
    assert {group['scales_fingerprint'] for group in steps[0].param_groups} == {fingerprint}
