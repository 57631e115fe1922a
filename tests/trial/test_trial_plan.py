from repopt_timm.trial.trial_plan import choose, open_runs

from .conftest import fake_run, run_trial

ARMS = ['--arms', 'sgd', 'repopt']


def best_at(lr):
    return lambda run: 50 - abs(run.arguments['lr'] - lr)


def test_learning_rates_come_first_and_then_seed_after_seed(trial):
    order = run_trial(trial(*ARMS, '--seeds', '2'), best_at(0.1))
    tuning = [f'tuning/{arm}/lr-{lr}' for arm in ('sgd', 'repopt') for lr in (0.05, 0.1, 0.2)]
    assert order == tuning + [f'runs/{arm}/seed-{seed}' for seed in (0, 1) for arm in ('sgd', 'repopt')]


def test_each_arm_trains_with_the_learning_rate_that_was_best_on_held_out_images(trial):
    runs = trial(*ARMS, '--seeds', '1')
    run_trial(runs, lambda run: best_at(0.1 if run.arguments['opt'] == 'sgd' else 0.4)(run))
    assert {arm: choose(runs, arm).best for arm in runs.settings.arms} == {'sgd': 0.1, 'repopt': 0.4}
    assert all(runs.tuning(arm, 0.1).arguments['holdout'] == 0.1 for arm in runs.settings.arms)
    assert 'holdout' not in runs.training('sgd', 0, 0.1).arguments


def test_a_given_learning_rate_is_not_tuned(trial):
    assert run_trial(trial(*ARMS, '--seeds', '1', '--lr', '0.3'), best_at(0.1)) == [
        'runs/sgd/seed-0',
        'runs/repopt/seed-0',
    ]


def test_a_trial_goes_on_where_it_was_and_takes_more_seeds(trial):
    runs = trial(*ARMS, '--seeds', '1', '--lr', '0.1')
    fake_run(runs.training('sgd', 0, 0.1), 50)
    assert run_trial(trial(*ARMS, '--seeds', '2', '--lr', '0.1'), best_at(0.1)) == [
        'runs/repopt/seed-0',
        'runs/sgd/seed-1',
        'runs/repopt/seed-1',
    ]


def test_half_a_run_is_not_finished(trial):
    runs = trial('--arms', 'sgd', '--seeds', '1', '--lr', '0.1', '--epochs', '4')
    run = runs.training('sgd', 0, 0.1)
    fake_run(run, 50)
    path = run.folder / 'summary.csv'
    path.write_text('\n'.join(path.read_text().splitlines()[:3]) + '\n')
    assert open_runs(runs) == [run]


def test_runs_that_diverge_are_not_tried_again(trial):
    runs = trial(*ARMS, '--seeds', '2', '--lr', '0.1')
    run_trial(runs, lambda run: None if run.arguments['seed'] == 0 else 40)
    assert runs.training('sgd', 0, 0.1).outcome.failure.startswith('The training loss of epoch 2')
    assert runs.training('sgd', 1, 0.1).outcome.top1 == 40


def test_an_arm_that_diverges_at_every_learning_rate_is_not_trained(trial):
    order = run_trial(trial(*ARMS, '--seeds', '1'), lambda run: None if run.arguments['opt'] == 'sgd' else 50)
    assert 'runs/repopt/seed-0' in order and 'runs/sgd/seed-0' not in order


def test_a_search_precedes_what_trains_with_its_scales_and_does_not_see_held_out_images(trial):
    runs = trial('--arms', 'search', '--search', '2', '--seeds', '1', '--lrs', '0.1', '0.2', '0.4')
    order = run_trial(runs, lambda run: best_at(0.2)(run) if 'lr' in run.arguments else 30)
    assert order[0] == 'searches/tuning' and order[-2:] == ['searches/seed-0', 'runs/search/seed-0']
    tuned = runs.tuning('search', 0.2)
    assert tuned.arguments['scales'].endswith('searches/tuning/scales.safetensors')
    assert tuned.after.arguments['holdout'] == tuned.arguments['holdout']
    assert runs.training('search', 0, 0.2).arguments['scales'].endswith('searches/seed-0/scales.safetensors')
