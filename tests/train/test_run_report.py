import re
import shlex

import pytest

from repopt_timm.cli import main
from repopt_timm.plot import plot_curves, plot_scales
from repopt_timm.train import run_report

from ..helpers import TINY
from .runs import read


@pytest.fixture
def pictures(monkeypatch, no_pictures):
    monkeypatch.setattr(run_report, 'plot_curves', plot_curves)
    monkeypatch.setattr(run_report, 'plot_scales', plot_scales)


def commands_of(folder):
    """The next commands of a report."""
    found = (folder / 'report.md').read_text().partition('## Next')[2]
    return [shlex.split(line)[1:] for line in found.splitlines() if line.startswith('repopt-timm ')]


@pytest.mark.parametrize('kind', [pytest.param('', marks=pytest.mark.slow), '_hs'])
def test_a_run_ends_with_a_report_of_what_it_was(kind, tmp_path, pictures):
    where = ['--dataset', 'digits', '--output', str(tmp_path), '--experiment', 'my run', '--model', TINY + kind]
    settings = '--input-size 1 16 16 --batch-size 512 --epochs 2 --workers 0 --no-aug --lr 0.02'
    assert main(['train', *where, *settings.split()]) == 0
    folder = tmp_path / 'my run'
    text = (folder / 'report.md').read_text()
    lines = ['# my run', f'`{TINY}{kind}` with', '## Command', '| epoch | lr | train_loss |', '## Scales', '## Next']
    assert all(line in text for line in lines)
    assert ('The search ' in text) == bool(kind)
    assert 'Missing' not in text
    # Initial values beside what the run has: the same where nothing was searched.
    [(started, found)] = re.findall(r'^\| stem \| kxk \| (\S+) \| (\S+) \|', text, re.MULTILINE)
    assert started == '1.0000' and (kind or found == started)
    for picture in re.findall(r'!\[[^]]*\]\(([^)]+)\)', text):
        assert (folder / picture).stat().st_size > 1000
    assert re.search(r"train -c '(.+)' --experiment again", text)[1] == str(folder / 'args.yaml')


def test_the_next_commands_of_a_search_train_its_target_with_the_settings_of_the_run(arguments, tmp_path, capsys):
    assert main(['train', *arguments('--seed', '7', '--mixup', '0.1', model=f'{TINY}_hs')]) == 0
    for command in commands_of(tmp_path / 'run'):
        assert main(command) == 0
    target, search = read(tmp_path / 'run-target')['args'], read(tmp_path / 'run')['args']
    assert (target.model, target.opt) == (TINY, 'repopt_sgd')
    assert target.scales == str(tmp_path / 'run/scales.safetensors')
    shared = ('data_dir', 'input_size', 'batch_size', 'epochs', 'lr', 'seed', 'mixup', 'warmup_epochs')
    assert all(getattr(target, name) == getattr(search, name) for name in shared)


def test_the_next_commands_of_a_target_work(arguments, images, tmp_path):
    assert main(['train', *arguments('--scales', 'initial', '--epochs', '1')]) == 0
    commands = {words[0]: words for words in commands_of(tmp_path / 'run')}
    assert commands['quantize'][2:4] == ['--data', str(images)]
    assert main(commands['evaluate']) == 0
    picture = next((images / 'validation/dark').iterdir())
    assert main([str(picture) if word == 'IMAGE' else word for word in commands['predict']]) == 0
    assert commands['push'][-1] == 'USER/REPO'


def test_the_classes_of_the_last_validation_are_in_the_report(arguments, tmp_path):
    pytest.importorskip('sklearn')
    assert main(['train', *arguments('--scales', 'initial', '--epochs', '1')]) == 0
    for _ in range(2):
        text = (tmp_path / 'run/report.md').read_text()
        assert re.search(r'^\| (dark|light) \| 8 \| \d+\.\d \|', text, re.MULTILINE)
        assert (tmp_path / 'run/confusion.csv').read_text().count('\n') == 3
        # As after a run that was finished before.
        assert main(['train', *arguments('--scales', 'initial', '--epochs', '1', '--resume')]) == 0
