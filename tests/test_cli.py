import json

import pytest
import torch

from repopt_timm import load_scales
from repopt_timm.cli import main

from .helpers import TINY, random_scales, tiny_model


@pytest.fixture
def search(tmp_path):
    """The checkpoint of a search."""
    model = tiny_model('_hs', scales=random_scales())
    torch.save({'state_dict': model.state_dict(), 'arch': f'{TINY}_hs'}, tmp_path / 'last.pth.tar')
    return tmp_path / 'last.pth.tar'


def test_scales_go_from_a_checkpoint_to_files_and_folders(search, tmp_path, capsys):
    file, folder = tmp_path / 'scales.safetensors', tmp_path / 'folder'
    assert main(['scales', 'extract', str(search), str(file)]) == 0
    assert main(['scales', 'convert', str(file), str(folder)]) == 0
    assert main(['scales', 'plot', str(folder), str(tmp_path / 'scales.png')]) == 0
    capsys.readouterr()
    for source in (search, file, folder, folder / 'README.md'):
        assert main(['scales', 'show', str(source), '--json']) == 0
        assert json.loads(capsys.readouterr().out)['fingerprint'] == load_scales(search).fingerprint


def test_a_table_is_shown_on_a_terminal(capsys):
    assert main(['scales', 'show', 'initial', '--architecture', 'repopt_vgg_b1']) == 0
    out = capsys.readouterr().out
    assert 'initial values, not searched' in out
    assert 'stage 3    identity      1.0000    1.0000    1.0000' in out


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['scales', 'show', 'nowhere'], "No scales found at 'nowhere'"),
        (['scales', 'show', 'hf-hub:a/b@'], 'names no revision'),
        (['scales', 'show', 'initial'], 'needs a model'),
        (['convert-checkpoint', 'x.pth'], 'Name a folder'),
        (
            ['train', '--scales', 'nowhere', '--dataset', 'digits', '--output', '{tmp}', '--data-dir', '{tmp}'],
            'nowhere',
        ),
    ],
)
def test_an_error_is_one_clear_line(arguments, message, tmp_path, capsys):
    assert main([argument.replace('{tmp}', str(tmp_path)) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith('error: ')
    assert message in error
    assert error.count('\n') == 1
