import re
import shlex

import pytest

from repopt_timm.cli import main

from ..helpers import TINY
from .runs import read


def commands_of(folder):
    """The next commands of a report."""
    found = (folder / 'report.md').read_text().partition('## Next')[2]
    return [shlex.split(line)[1:] for line in found.splitlines() if line.startswith('repopt-timm ')]


@pytest.mark.parametrize('kind', ['', '_hs'])
def test_a_run_ends_with_a_report_of_what_it_was(kind, trained, searched):
    folder = searched if kind else trained
    text = (folder / 'report.md').read_text()
    lines = ['# run', f'`{TINY}{kind}` with', '## Command', '| epoch | lr | train_loss |', '## Scales', '## Next']
    assert all(line in text for line in lines)
    assert ('The search ' in text) == bool(kind)
    # Initial values beside what the run has: the same where nothing was searched.
    [(started, found)] = re.findall(r'^\| stem \| kxk \| (\S+) \| (\S+) \|', text, re.MULTILINE)
    assert started == '1.0000' and (kind or found == started)
    for picture in re.findall(r'!\[[^]]*\]\(([^)]+)\)', text):
        assert (folder / picture).stat().st_size > 1000
    assert re.search(r'train -c (.+) --experiment again', text)[1] == str(folder / 'args.yaml')


def test_the_next_commands_of_a_search_train_its_target_with_the_settings_of_the_run(searched):
    for command in commands_of(searched):
        assert main(command) == 0
    target, search = read(searched.parent / 'run-target')['args'], read(searched)['args']
    assert (target.model, target.opt) == (TINY, 'repopt_sgd')
    assert target.scales == str(searched / 'scales.safetensors')
    shared = ('data_dir', 'input_size', 'batch_size', 'epochs', 'lr', 'seed', 'mixup', 'warmup_epochs')
    assert all(getattr(target, name) == getattr(search, name) for name in shared)


def test_the_next_commands_of_a_target_work(trained, images):
    commands = {words[0]: words for words in commands_of(trained)}
    assert commands['quantize'][2:4] == ['--data', str(images)]
    assert main(commands['evaluate']) == 0
    picture = next((images / 'validation/dark').iterdir())
    assert main([str(picture) if word == 'IMAGE' else word for word in commands['predict']]) == 0
    assert commands['push'][-1] == 'USER/REPO'


def test_the_classes_of_the_last_validation_are_in_the_report_of_a_finished_run_too(arguments, copied):
    pytest.importorskip('sklearn')
    for _ in range(2):
        text = (copied / 'report.md').read_text()
        assert re.search(r'^\| +(dark|light) +\| +8 +\| +\d+\.\d+ +\|', text, re.MULTILINE)
        assert (copied / 'confusion.csv').read_text().count('\n') == 3
        (copied / 'report.md').unlink()
        assert main(['train', *arguments('--resume')]) == 0
