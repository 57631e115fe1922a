import pytest

from repopt_timm.trial.trial_settings import read_arguments, read_shared, read_trial

from ..helpers import TINY


@pytest.fixture
def trial(tmp_path):
    """Makes a trial of a model of six convolutions on images that nobody reads, and writes its folder."""

    def make(*words, folder='trial'):
        args, rest = read_arguments([TINY, '--data', 'images', '--output', str(tmp_path / folder), *words])
        shared = read_shared(TINY, args.config, args.data, rest)
        made = read_trial(args, TINY, shared)
        made.joined(args.reference).write()
        return made

    return make


@pytest.fixture
def trained(trial):
    """Makes a trial at one learning rate, with a run of each arm that has trained."""

    def make(*words):
        made = trial('--lr', '0.1', *words)
        for arm in made.arms:
            fake_run(made.training(arm, 0, 0.1), 50)
        return made

    return make


def fake_run(run, top1, seconds=1.0):
    """Leaves what a training with this accuracy leaves in the end, or one that diverged at last if it is None."""
    run.folder.mkdir(parents=True, exist_ok=True)
    if top1 is None:
        (run.folder / 'diverged.txt').write_text('The training loss of epoch 2 is not finite.\n')
    elif run.kind == 'searches':
        (run.folder / 'scales.safetensors').touch()
    top1 = top1 or 10
    epochs = range(1, run.epochs + 1)
    lines = [f'{epoch},0.1,{3 - epoch / 10},2,{top1 * epoch / run.epochs},99' for epoch in epochs]
    head = 'epoch,lr,train_loss,eval_loss,eval_top1,eval_top5'
    (run.folder / 'summary.csv').write_text('\n'.join([head, *lines, '']))
    (run.folder / 'times.csv').write_text(''.join(['epoch,train_seconds\n', *(f'{n},{seconds}\n' for n in epochs)]))


def run_trial(trial, top1):
    """Runs a trial with a fake runner, and returns the folders of its runs in the order that they ran in."""
    order = []
    while ready := trial.open_runs():
        fake_run(ready[0], top1(ready[0]))
        order.append(str(ready[0].folder.relative_to(trial.folder)))
    return order
