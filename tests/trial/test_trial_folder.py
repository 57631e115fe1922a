from dataclasses import replace

import pytest

from repopt_timm import Scales
from repopt_timm.cli import main
from repopt_timm.trial.networks import make_network
from repopt_timm.trial.trial_command import read_fingerprints
from repopt_timm.trial.trial_folder import open_trial

from ..helpers import TINY, counted_scales
from .conftest import fake_run, run_trial

ARMS = ['--arms', 'sgd', 'repopt']


def best_at(lr):
    return lambda run: 50 - abs(run.arguments['lr'] - lr)


def test_learning_rates_come_first_and_then_seed_after_seed(trial):
    made = trial(*ARMS, '--seeds', '2')
    order = run_trial(made, lambda run: best_at(0.1 if run.arguments['opt'] == 'sgd' else 0.2)(run))
    tuning = [f'tuning/sgd/lr-{lr}' for lr in (0.05, 0.1, 0.2)] + [f'tuning/repopt/lr-{lr}' for lr in (0.05, 0.1, 0.2)]
    assert order[:6] == tuning and order[6] == 'tuning/repopt/lr-0.4'
    assert order[7:] == [f'runs/{arm}/seed-{seed}' for seed in (0, 1) for arm in ('sgd', 'repopt')]
    assert {arm: made.choice(arm).best for arm in made.arms} == {'sgd': 0.1, 'repopt': 0.2}
    assert made.tuning('sgd', 0.1).arguments['holdout'] == 0.1
    assert 'holdout' not in made.training('sgd', 0, 0.1).arguments


def test_a_trial_goes_on_where_it_was_and_takes_more_seeds(trial, trained):
    half = trained(*ARMS, '--seeds', '1').training('repopt', 0, 0.1).folder / 'summary.csv'
    half.write_text('\n'.join(half.read_text().splitlines()[:3]) + '\n')
    order = run_trial(trial(*ARMS, '--seeds', '2', '--lr', '0.1'), best_at(0.1))
    assert order == ['runs/repopt/seed-0', 'runs/sgd/seed-1', 'runs/repopt/seed-1']


def test_a_search_precedes_what_trains_with_its_scales_and_does_not_see_held_out_images(trial):
    made = trial('--arms', 'search', '--search', '2', '--seeds', '1', '--lrs', '0.1', '0.2', '0.4')
    order = run_trial(made, lambda run: best_at(0.2)(run) if 'lr' in run.arguments else 30)
    assert order[0] == 'searches/tuning' and order[-2:] == ['searches/seed-0', 'runs/search/seed-0']
    tuned = made.tuning('search', 0.2)
    assert tuned.arguments['scales'].endswith('searches/tuning/scales.safetensors')
    assert tuned.search.arguments['holdout'] == tuned.arguments['holdout']
    assert tuned.search.arguments['weight_decay'] == 4e-5 and 'lr' not in tuned.search.arguments
    assert made.training('search', 0, 0.2).arguments['scales'].endswith('searches/seed-0/scales.safetensors')


def test_seeds_of_two_protocols_are_not_pooled_but_where_they_are_computed_may_change(trial, trained):
    words = ['--lr', '0.1', '--arms', 'sgd', '--seeds', '5']
    trained('--arms', 'sgd')
    for other in ('--epochs 9', '--crop-pct 0.5', '--val-interval 2', '--channels-last', '--lr 0.2'):
        with pytest.raises(ValueError, match=f'arguments: {other.split()[0][2:].replace("-", "_")} '):
            trial(*words, *other.split())
    free = '--workers 2 --pin-mem --device cpu --jobs 2 --threads 1 --validation-batch-size 9 --checkpoint-hist 9'
    trial(*words, *free.split(), '--log-interval', '9', '--log-tensorboard', '--cache-images')


def test_an_argument_that_an_older_folder_lacks_had_its_default(trial, trained):
    words = ['--lr', '0.1', '--arms', 'sgd', '--seeds', '5']
    path = trained('--arms', 'sgd').folder / 'shared.yaml'
    path.write_text(''.join(line for line in path.open() if not line.startswith('smoothing')))
    with pytest.raises(ValueError, match=r'smoothing 0\.1 -> 0\.3'):
        trial(*words, '--smoothing', '0.3')
    trial(*words)


def test_a_network_that_cannot_be_made_changes_nothing(images, trained, tmp_path, capsys):
    words = ['--data', str(images), '--device', 'cpu', '--channels-last', '--img-size', '96']
    folder = trained(*words, '--arms', 'sgd').folder
    before = (folder / 'trial.yaml').read_text()
    words = ['trial', TINY, *words, '--lr', '0.1', '--output']
    assert main([*words, str(folder), '--arms', 'branches']) == 1
    assert 'corrupts memory' in capsys.readouterr().err
    assert (folder / 'trial.yaml').read_text() == before
    assert main([*words, str(tmp_path / 'fresh'), '--model-kwargs', 'nonsense=1']) == 1
    assert 'nonsense' in capsys.readouterr().err
    assert not (tmp_path / 'fresh/trial.yaml').exists()


def test_the_reference_and_the_search_stay_until_others_are_named(trial, trained):
    folder = trained('--arms', 'sgd', 'search', '--search', '3', '--reference', 'search').folder
    trial('--lr', '0.1', '--arms', 'sgd', '--seeds', '5')
    found = open_trial(folder)
    assert (found.arms, found.search, found.reference, len(found.seeds)) == (['sgd', 'search'], 3, 'search', 5)
    trial('--lr', '0.1', '--arms', 'sgd', '--reference', 'sgd')
    assert open_trial(folder).reference == 'sgd'
    with pytest.raises(ValueError, match='search 3 -> 4'):
        trial('--lr', '0.1', '--arms', 'search', '--search', '4')


def test_given_scales_have_an_arm_each(trial, trained):
    words = ['--scales', 'mine.safetensors', 'published=b1.csv', '--arms', 'published', 'scales', 'sgd']
    made = trained(*words)
    given = {arm: made.training(arm, 0, 0.1).arguments.get('scales') for arm in made.arms}
    assert given == {'sgd': None, 'scales': 'mine.safetensors', 'published': 'b1.csv'}
    trial('--lr', '0.1', '--scales', 'third=c.csv')
    assert open_trial(made.folder).arms[-3:] == ['scales', 'published', 'third']
    assert open_trial(made.folder).scales['published'] == 'b1.csv'
    with pytest.raises(ValueError, match=r'published.*b1\.csv.* -> .*b2\.csv'):
        trial('--lr', '0.1', '--scales', 'published=b2.csv')


def test_given_scales_are_known_by_their_fingerprint(trial, tmp_path):
    path = tmp_path / 'mine.safetensors'

    def call(seeds):
        made = trial('--arms', 'mine', '--scales', f'mine={path}', '--lr', '0.1', '--seeds', str(seeds))
        found = replace(made, fingerprints=read_fingerprints(made))
        found.joined().write()
        return found

    network = make_network(trial(folder='other'))
    initial = Scales.initial(network)
    initial.save(path)
    fake_run(call(1).training('mine', 0, 0.1), 50)
    counted_scales(network).save(path)
    with pytest.raises(ValueError, match=rf"fingerprints of mine '{initial.fingerprint}' -> "):
        call(2)
    initial.save(path)
    run_trial(call(2), lambda run: 50)
    # A trial whose runs are all finished can do without the file.
    path.unlink()
    assert call(2).fingerprints == {}
