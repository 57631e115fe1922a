import re

import pytest

from repopt_timm.cli import main
from repopt_timm.train import run_report

from ..helpers import TINY

DRAW = run_report._draw


@pytest.mark.parametrize('kind', [pytest.param('', marks=pytest.mark.slow), '_hs'])
def test_a_run_ends_with_a_report_of_what_it_was_and_what_to_do_next(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(run_report, '_draw', DRAW)
    where = ['--dataset', 'digits', '--output', str(tmp_path), '--experiment', 'my run', '--model', TINY + kind]
    settings = '--input-size 1 16 16 --batch-size 512 --epochs 2 --warmup-epochs 0 --workers 0 --no-aug --lr 0.02'
    scales = [] if kind else ['--scales', 'initial']
    assert main(['train', *where, *settings.split(), *scales]) == 0
    folder = tmp_path / 'my run'
    text = (folder / 'report.md').read_text()
    for line in (
        '# my run',
        f'`{TINY}{kind}` with',
        '## Command',
        '| epoch | lr | train_loss |',
        '## Scales',
        '## Next',
    ):
        assert line in text
    assert re.search(r'Versions: torch \S+, torchvision \S+, timm \S+\.', text)
    # Initial values beside what the run has: the same where nothing was searched.
    starts = re.findall(r'^\| stem \| kxk \| (\S+) \| (\S+) \|', text, re.MULTILINE)
    assert len(starts) == 1
    assert starts[0][0] == '1.0000'
    assert kind or starts[0][0] == starts[0][1]
    for picture in re.findall(r'!\[[^]]*\]\(([^)]+)\)', text):
        assert (folder / picture).stat().st_size > 1000
    commands = text.partition('## Next')[2]
    wanted = f'train --dataset digits --model {TINY} --scales' if kind else 'predict IMAGE --model'
    assert f"repopt-timm {wanted} '{folder}/" in commands
    again = re.search(r"train -c '(.+)' --experiment again", text)[1]
    assert again == str(folder / 'args.yaml')
