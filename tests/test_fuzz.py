"""Files of anyone, damaged at random: what reads them says so in one line, and soon."""

import random
import time

import pytest
import torch
import yaml

from repopt_timm import load_scales
from repopt_timm.cards.repository import save_scales_card
from repopt_timm.checkpoints.read import read_checkpoint
from repopt_timm.optim import build_repopt_sgd
from repopt_timm.train.parsing import ARGUMENTS, read_config

from .helpers import TINY, random_scales, tiny_model

NASTY = [*b'\0 \xff\xff\xff 99999999999999999999999 -1 1:1:1:1 { [[[[[[[[[[[[ &a *a !!int nan R'.split(), b'\n', b'*a ']


@pytest.fixture(scope='module')
def samples(tmp_path_factory):
    """A file of each kind, and its reader."""
    folder = tmp_path_factory.mktemp('samples')
    scales = random_scales()
    save_scales_card(scales, folder)
    scales.save(folder / 'scales.safetensors')
    model = tiny_model(scales=scales)
    optimizer = build_repopt_sgd(model, scales, lr=0.1).state_dict()
    content = {'arch': TINY, 'state_dict': model.state_dict(), 'optimizer': optimizer, 'history': [{'epoch': 0}]}
    torch.save(content, folder / 'last.pth')
    torch.save(content, folder / 'old.pth', _use_new_zipfile_serialization=False)
    search = tiny_model('_hs', scales=scales)
    torch.save({'arch': f'{TINY}_hs', 'state_dict': search.state_dict()}, folder / 'search.pth')
    defaults = {name: argument.default for name, argument in ARGUMENTS.items() if argument.default is not None}
    (folder / 'args.yaml').write_text(yaml.safe_dump(defaults))
    readers = dict.fromkeys(('README.md', 'scales.safetensors', 'search.pth'), load_scales)
    readers |= {'last.pth': read_checkpoint, 'old.pth': read_checkpoint, 'args.yaml': read_config}
    return {name: ((folder / name).read_bytes(), reader) for name, reader in readers.items()}


def damaged(content: bytes, generator: random.Random) -> bytes:
    for _ in range(generator.randint(1, 4)):
        # Headers, front matter and pickles stand at the start, directories of archives at the end.
        at = generator.choice([generator.randrange(len(content) + 1), generator.randrange(min(len(content) + 1, 2000))])
        new = generator.choice([generator.randbytes(4), generator.choice(NASTY), content[at : at + 200] * 2, b''])
        rest = generator.choice([content[at + generator.randint(0, 100) :], content[at + len(new) :], b''])
        content = content[:at] + new + rest
    return content


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('seed', range(12))
def test_a_damaged_file_of_any_kind_is_refused_in_one_line_and_soon(samples, tmp_path, seed):
    generator = random.Random(seed)
    for name, (content, read) in samples.items():
        for _ in range(10):
            (tmp_path / name).write_bytes(damaged(content, generator))
            start = time.process_time()
            try:
                read(str(tmp_path / name))
            except (ValueError, OSError) as error:
                assert '\n' not in str(error).strip(), str(error)[:500]
                assert len(str(error)) < 2000
            assert time.process_time() - start < 10
