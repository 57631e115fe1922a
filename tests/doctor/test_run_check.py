import json
import re
import shutil

import pytest
import torch
import yaml

from repopt_timm.cli import main
from repopt_timm.doctor import check_run

from ..helpers import TINY, random_scales


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The folder of a run of two epochs, with scales from a file beside it."""
    folder = tmp_path_factory.mktemp('output')
    torch.manual_seed(0)
    random_scales(strides=(2, 1, 2, 2, 2)).save(folder / 'scales.safetensors')
    where = ['--dataset', 'digits', '--output', str(folder), '--experiment', 'run']
    what = ['--model', TINY, '--scales', str(folder / 'scales.safetensors'), '--model-kwargs', 'strides=(2,1,2,2,2)']
    settings = '--input-size 1 16 16 --batch-size 512 --epochs 2 --warmup-epochs 0 --lr 0.02 --workers 0 --no-aug'
    assert main(['train', *where, *what, *settings.split()]) == 0
    return folder / 'run'


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / 'run')


def edited(path, change):
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def break_weight(content):
    content['state_dict']['stem.conv.weight'].fill_(float('nan'))


def damage_zip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def best_first(run):
    epoch = torch.load(run / 'model_best.pth.tar', weights_only=False)['epoch']
    shutil.copy(run / f'checkpoint-{1 - epoch}.pth.tar', run / 'model_best.pth.tar')


def change_arguments(run):
    path = run / 'args.yaml'
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), 'lr': 0.5}))


def other_fingerprint(content):
    content['optimizer']['param_groups'][0]['scales_fingerprint'] = 'f' * 64


DAMAGES = {
    'temporary files': (lambda run: (run / '.last-abc.tmp.tar').touch(), r'\.last-abc\.tmp\.tar: left by a process'),
    'last.pth.tar': (lambda run: damage_zip(run / 'last.pth.tar'), 'is damaged'),
    'model_best.pth.tar': (
        lambda run: edited(run / 'model_best.pth.tar', break_weight),
        r"'state_dict\.stem\.conv\.weight' is not finite",
    ),
    'history': (
        lambda run: (run / 'summary.csv').write_text((run / 'summary.csv').read_text().replace('\n2,', '\n3,')),
        r'epoch 2 in summary\.csv is not that of last\.pth\.tar',
    ),
    'best epoch': (best_first, r'and epoch \d was better'),
    'arguments': (change_arguments, r'args\.yaml and last\.pth\.tar differ in lr'),
    'scales': (
        lambda run: edited(run / 'last.pth.tar', other_fingerprint),
        'the optimizer has .*f{64}, the checkpoint [0-9a-f]{64}',
    ),
}


def test_a_run_is_as_it_should_be(run, capsys):
    assert main(['doctor', str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {'ok'}
    assert any(line.startswith('ok      scales') for line in lines)


@pytest.mark.parametrize('what', DAMAGES)
def test_what_is_not_is_named(what, run, capsys):
    damage, message = DAMAGES[what]
    damage(run)
    assert main(['doctor', str(run), '--json']) == 1
    captured = capsys.readouterr()
    failed = {row['what']: row['detail'] for row in json.loads(captured.out)['findings'] if row['status'] == 'failed'}
    assert list(failed) == [what]
    assert re.search(message, failed[what])
    assert f'is not as a run should leave it: {what}.' in captured.err


def test_scales_that_are_gone_are_a_note_and_a_folder_without_a_run_an_error(run, tmp_path):
    edited(run / 'last.pth.tar', lambda content: setattr(content['args'], 'scales', 'gone.safetensors'))
    found = {each.what: each for each in check_run(run)}
    assert found['scales'].status == 'note'
    assert 'gone.safetensors' in found['scales'].detail
    with pytest.raises(
        FileNotFoundError, match=r"There is no run in '.*', expected a folder with last\.pth\.tar\. Name"
    ):
        check_run(tmp_path / 'none')
