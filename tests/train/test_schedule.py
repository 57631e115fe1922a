import copy

import pytest
import torch
from timm.scheduler import create_scheduler_v2

from repopt_timm.train import schedule
from repopt_timm.train.command import main
from repopt_timm.train.engine import TrainState
from repopt_timm.train.schedule import choose_schedule, replay_schedule

from .runs import read


@pytest.mark.parametrize(
    ('given', 'chosen'),
    [
        ((1,), (0.1, True)),
        ((5,), (0.5, True)),
        ((49,), (4.9, True)),
        ((50,), (5, False)),
        ((300,), (5, False)),
        ((300, 'cosine', None, True), (5.0, True)),
        ((5, 'cosine', 3), (3, True)),
        # It waits for the accuracy after an epoch.
        ((5, 'plateau'), (0, False)),
        ((25, 'plateau'), (2, False)),
    ],
)
def test_a_run_warms_up_for_a_tenth_of_its_epochs_and_by_updates_if_they_are_few(given, chosen):
    assert choose_schedule(*given) == chosen


def test_a_run_that_is_resumed_keeps_its_warm_up(arguments, tmp_path):
    words = arguments('--scales', 'initial', '--sched', 'step', '--epochs', '4')
    given = words.index('--warmup-epochs')
    del words[given : given + 2]
    main(words)
    main([*words, '--epochs', '5', '--resume'])
    args, history = read(tmp_path / 'run')['args'], read(tmp_path / 'run')['history']
    assert [row['lr'] for row in history] == [1e-5, *[0.02] * 4]
    assert (args.warmup_epochs, args.sched_on_updates) == (0.4, True)


def test_a_schedule_that_timm_does_not_have_is_refused(arguments, monkeypatch):
    monkeypatch.setattr(schedule, 'create_scheduler_v2', lambda *args, **kwargs: (None, 5))
    with pytest.raises(ValueError, match="'cosine'"):
        main(arguments('--scales', 'initial'))
    main(arguments('--scales', 'initial', '--sched', 'none', '--epochs', '1'))


def test_a_warm_up_that_is_never_over_is_said(arguments, capsys):
    main(arguments('--scales', 'initial', '--epochs', '1'))
    assert 'never reaches 0.02: lower --warmup-epochs' in capsys.readouterr().err


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
