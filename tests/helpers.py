import io
import os
import tarfile
from pathlib import Path

import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image

from repopt_timm import Scales, save_pretrained
from repopt_timm.cli import main

TINY = 'test_repopt_vgg'


def python_path() -> str:
    """Where a process finds this checkout, whatever is installed, and then what this one finds by its environment."""
    return os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get('PYTHONPATH'))))


def random_scales(architecture: str = TINY, **kwargs) -> Scales:
    """Scales as a search might leave them: spread around the initial values, a few of them negative."""
    return counted_scales(timm.create_model(architecture, **kwargs))


def counted_scales(model: torch.nn.Module, prior=None) -> Scales:
    """Random scales for the branches that a prior gives a network."""
    initial = Scales.initial(model, prior)
    modules = {
        module: {branch: vector + 0.6 * torch.randn_like(vector) for branch, vector in vectors.items()}
        for module, vectors in initial.items()
    }
    return Scales(initial.architecture, modules, initial.geometry, initial.counts)


def tiny_model(kind: str = '', **kwargs) -> torch.nn.Module:
    kwargs.setdefault('num_classes', 5)
    return timm.create_model(TINY + kind, **kwargs)


def save_unknown_twin(name: str, folder: Path) -> torch.nn.Module:
    """Saves a twin of a timm network as another process does, before this one has registered it."""
    model = timm.create_model(name, num_classes=3).eval()
    save_pretrained(model, folder)
    config = folder / 'config.json'
    assert not timm.is_model(f'repopt_{name}')
    config.write_text(config.read_text().replace(f'"architecture": "{name}"', f'"architecture": "repopt_{name}"'))
    return model


def relative_difference(first: torch.nn.Module, second: torch.nn.Module, smallest: float = 0.0) -> float:
    """Largest relative difference of a parameter or buffer, in the 2-norm; NaN if one is.

    Tensors whose norm is `smallest` at most do not count: a bias in front of a BatchNorm stays zero but for rounding.
    """
    pairs = zip(first.state_dict().values(), second.state_dict().values())
    found = [
        (a - b).norm() / b.norm().clamp(min=1e-30)
        for a, b in pairs
        if a.is_floating_point() and not b.norm() <= smallest
    ]
    return torch.stack(found).max().item()


def write_images(root: Path, counts: dict[str, int], levels: dict[str, int], noise: int) -> Path:
    """Writes as many images to each split as `counts` says, of each class: noise around the level of the class."""
    generator = torch.Generator().manual_seed(0)
    for split, count in counts.items():
        for label, level in levels.items():
            (root / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = (level + noise * torch.randn(32, 32, 3, generator=generator)).clamp(0, 255).byte().numpy()
                Image.fromarray(pixels).save(root / split / label / f'{index}.png')
    return root


def write_tar(path: Path, count: int, folder: str = '{}') -> None:
    """Pictures of noise in two classes, no two of which are alike."""
    generator = torch.Generator().manual_seed(0)
    with tarfile.open(path, 'w') as archive:
        for index in range(count):
            buffer = io.BytesIO()
            noise = torch.randint(256, (64, 64, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(noise.numpy()).save(buffer, 'PNG')
            member = tarfile.TarInfo(f'{folder.format(("cat", "dog")[index % 2])}/{index}.png')
            member.size = len(buffer.getvalue())
            archive.addfile(member, io.BytesIO(buffer.getvalue()))


def card_of(folder):
    """The model card of a folder."""
    return ModelCard.load(folder / 'README.md')


def read_tree(folder):
    """The content of the files of a folder, by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def assert_refused(words, named, capsys):
    """Runs a command that ends in one line, an error that names the mistake."""
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith('error: ') and named in error and error.count('\n') == 1, error
