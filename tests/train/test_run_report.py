import re

import pytest

from repopt_timm.cli import main
from repopt_timm.train import run_report
from repopt_timm.train.parsing import parse_arguments

from ..helpers import TINY, tiny_model

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


def report(folder, *words, kind='', **more):
    """The text of the report on a run of two epochs, of which the second was the better but is not finite."""
    args = parse_arguments(['--model', TINY + kind, '--opt', 'sgd', *words])
    vars(args).update(more)
    rows = [{'epoch': epoch, 'lr': 0.1, 'train_loss': 1.0, 'eval_top1': 50.0 + epoch} for epoch in range(2)]
    rows[1]['eval_loss'] = float('inf')
    (folder / 'model_best.pth.tar').touch()
    run_report.write_report(folder, tiny_model(kind), args, rows, 1.0)
    return (folder / 'report.md').read_text()


def test_the_best_epoch_is_that_of_the_best_checkpoint(tmp_path):
    assert 'top-1 51.00 % after 2 epochs, at best 50.00 % after epoch 1; the last' in report(tmp_path, 'photos')


@pytest.mark.parametrize(
    ('words', 'images'),
    [
        ('photos', 'photos'),
        ('photos --train-split learn', 'photos --split learn'),
        ('--dataset digits', 'output/digits'),
        ('--dataset torch/cifar10 --data-dir cifar', None),
        ('--dataset hfds/cifar10', None),
    ],
)
def test_quantization_is_suggested_on_a_folder_of_images(tmp_path, words, images):
    found = re.search('quantize .* --data (.*) --out ', report(tmp_path, *words.split()))
    assert (found[1] if found else None) == images


def test_a_search_names_all_of_its_data_for_the_training_after_it(tmp_path):
    text = report(tmp_path, '--dataset', 'torch/cifar10', '--data-dir', 'cifar', kind='_hs')
    assert f'train --dataset torch/cifar10 --data-dir cifar --model {TINY} --scales' in text


def test_the_report_of_a_quantized_training_names_no_command_that_refuses_it(tmp_path):
    text = report(tmp_path, 'photos', quantization={'weight_bits': 4})
    assert re.findall('^repopt-timm .*', text, re.M) == [f'repopt-timm doctor {tmp_path}']
