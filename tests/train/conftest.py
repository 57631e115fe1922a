import pytest
import torch
from PIL import Image

from ..helpers import TINY


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    """Two classes of noisy pictures, 24 of each for training and 8 for validation."""
    root = tmp_path_factory.mktemp('images')
    generator = torch.Generator().manual_seed(0)
    for split, count in (('train', 24), ('validation', 8)):
        for label, base in (('dark', 60), ('light', 190)):
            folder = root / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = (base + 30 * torch.randn(32, 32, 3, generator=generator)).clamp(0, 255).byte().numpy()
                Image.fromarray(pixels).save(folder / f'{index}.png')
    return root


@pytest.fixture
def arguments(images, tmp_path):
    """Makes arguments of a short run on these images."""

    def make(*extra, model=TINY, experiment='run'):
        defaults = '--input-size 3 32 32 --batch-size 8 --epochs 3 --warmup-epochs 1 --lr 0.02 --workers 0 --seed 1'
        where = [str(images), '--model', model, '--output', str(tmp_path), '--experiment', experiment]
        return [*where, *defaults.split(), *extra]

    return make
