import csv

import pytest

from repopt_timm.console import CommandParser
from repopt_timm.trial.trial_command import add_commands
from repopt_timm.trial.trial_folder import joined_settings, write_settings
from repopt_timm.trial.trial_plan import open_runs
from repopt_timm.trial.trial_runs import TrialRuns
from repopt_timm.trial.trial_settings import read_settings

from ..helpers import TINY


def parse(words):
    parser = CommandParser()
    add_commands(parser.add_subparsers())
    namespace = parser.parse_args(['trial', *words])
    del namespace.run
    return namespace


def settings_of(*words):
    """What a command line means; a model of six convolutions on images that nobody reads."""
    return read_settings(parse([TINY, '--data', 'images', *words]))


def write_summary(folder, accuracies, losses=None, seconds=1.0):
    """Writes what a run with these accuracies leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {'epoch': epoch, 'lr': 0.1, 'train_loss': 3 - epoch / 10, 'eval_loss': 2, 'eval_top1': top1, 'eval_top5': 99}
        for epoch, top1 in enumerate(accuracies, 1)
    ]
    with open(folder / 'summary.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    lines = ''.join(f'{row["epoch"]},{seconds}\n' for row in rows)
    (folder / 'times.csv').write_text('epoch,train_seconds\n' + lines)


@pytest.fixture
def trial(tmp_path):
    """Makes the runs of a trial."""

    def make(*words, folder='trial'):
        settings, shared, local = settings_of(*words)
        folder = tmp_path / folder
        write_settings(folder, joined_settings(folder, settings, shared, local.reference), shared)
        return TrialRuns(folder, settings, shared)

    return make


def fake_run(run, top1, seconds=1.0):
    """Leaves what a training with this accuracy leaves in the end, or one that diverged if it is None."""
    if top1 is None:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / 'diverged.txt').write_text('The training loss of epoch 2 is not finite.\n')
        return
    write_summary(run.folder, [top1 * epoch / run.epochs for epoch in range(1, run.epochs + 1)], seconds=seconds)
    if run.result is not None:
        run.result.touch()


def run_trial(runs, top1):
    """Runs a trial with a fake runner, and returns the folders of its runs in the order that they ran in."""
    order = []
    while ready := open_runs(runs):
        run = ready[0]
        fake_run(run, top1(run))
        order.append(str(run.folder.relative_to(runs.folder)))
    return order
