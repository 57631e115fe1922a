import copy

import pytest
import torch
from timm.scheduler import create_scheduler_v2

from repopt_timm.train import schedule
from repopt_timm.train.command import main
from repopt_timm.train.engine import TrainState
from repopt_timm.train.parsing import parse_arguments
from repopt_timm.train.schedule import choose_warmup, replay_schedule

from .runs import read


@pytest.mark.parametrize(
    ('words', 'warmup'),
    [('1', 0), ('4', 0), ('5', 1), ('24', 4), ('25', 5), ('300', 5), ('5 --warmup-epochs 3', 3)],
)
def test_a_run_warms_up_for_a_fifth_of_its_epochs_unless_given(tmp_path, words, warmup):
    args = parse_arguments(['--epochs', *words.split()])
    choose_warmup(args, tmp_path)
    assert args.warmup_epochs == warmup


def test_a_run_reaches_its_learning_rate_and_keeps_its_warm_up_when_it_is_resumed(arguments, tmp_path):
    words = arguments('--scales', 'initial', '--sched', 'step')
    given = words.index('--warmup-epochs')
    del words[given : given + 2]
    for epochs in ('5', '10'):
        main([*words, '--epochs', epochs, '--resume'])
        assert [row['lr'] for row in read(tmp_path / 'run')['history']].index(0.02) == 1


def test_a_schedule_that_timm_does_not_have_is_refused(arguments, monkeypatch):
    monkeypatch.setattr(schedule, 'create_scheduler_v2', lambda *args, **kwargs: (None, 5))
    with pytest.raises(ValueError, match=r"timm \S+ has no schedule 'cosine': upgrade timm"):
        main(arguments('--scales', 'initial'))
    main(arguments('--scales', 'initial', '--sched', 'none'))


def test_a_warm_up_that_is_never_over_is_said(arguments, capsys):
    main(arguments('--scales', 'initial', '--epochs', '1'))
    text = '--warmup-epochs is 1 and --epochs 1, so that the learning rate never reaches 0.02: lower --warmup-epochs.'
    assert text in capsys.readouterr().err


@pytest.mark.parametrize('warmup', [0, 1])
def test_a_plateau_schedule_goes_on_from_its_own_learning_rate(warmup):
    def begin():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
        scheduler, _ = create_scheduler_v2(optimizer, 'plateau', 9, patience_epochs=0, warmup_epochs=warmup)
        return TrainState(torch.nn.Identity(), optimizer, scheduler)

    whole = begin()
    for epoch in range(6):
        resumed = begin()
        resumed.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
        resumed.history = list(whole.history)
        replay_schedule(resumed, 1)
        assert resumed.optimizer.param_groups[0]['lr'] == whole.optimizer.param_groups[0]['lr']
        whole.history.append({'epoch': epoch, 'eval_top1': 50.0})
        whole.scheduler.step(epoch + 1, 50.0)
    assert whole.optimizer.param_groups[0]['lr'] < 1e-6
