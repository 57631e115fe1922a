import pytest

from repopt_timm.cli import main
from repopt_timm.trial.results import read_results
from repopt_timm.trial.trial_folder import read_saved_settings

from ..helpers import TINY
from .conftest import fake_run


@pytest.fixture
def trained(trial):
    """Makes a trial with a run of each arm that has trained."""

    def make(*words):
        runs = trial(*words)
        for arm in runs.settings.arms:
            fake_run(runs.training(arm, 0, 0.1), 50)
        return runs

    return make


def test_a_folder_takes_one_trial_only(trial, trained):
    trained('--lr', '0.1')
    trial('--lr', '0.1', '--seeds', '5', '--arms', 'sgd', '--workers', '0')
    trial('--lr', '0.1', '--search', '3')
    for words, name in ((['--lr', '0.2'], 'lr 0.1 -> 0.2'), (['--lr', '0.1', '--epochs', '9'], 'epochs 10 -> 9')):
        with pytest.raises(ValueError, match=name):
            trial(*words)


@pytest.mark.parametrize(
    'words',
    [
        ['--crop-pct', '0.5'],
        ['--interpolation', 'bicubic'],
        ['--val-split', 'test'],
        ['--val-num-samples', '9'],
        ['--val-interval', '2'],
        ['--cooldown-epochs', '1'],
        ['--channels-last'],
        ['--grad-checkpointing'],
        ['--torchcompile'],
        ['--batch-size', '64'],
        ['--train-images', '9'],
    ],
)
def test_seeds_of_two_protocols_are_not_pooled(trial, trained, words):
    trained('--lr', '0.1', '--arms', 'sgd')
    with pytest.raises(ValueError, match=f'with other arguments: {words[0][2:].replace("-", "_")} '):
        trial('--lr', '0.1', '--arms', 'sgd', '--seeds', '5', *words)


@pytest.mark.parametrize(
    'words',
    [
        ['--workers', '2', '--pin-mem'],
        ['--cache-images'],
        ['--device', 'cpu'],
        ['--jobs', '2', '--threads', '1'],
        ['--validation-batch-size', '9'],
        ['--checkpoint-hist', '9'],
        ['--log-interval', '9', '--log-tensorboard'],
    ],
)
def test_where_a_trial_is_computed_may_change(trial, trained, words):
    trained('--lr', '0.1', '--arms', 'sgd')
    trial('--lr', '0.1', '--arms', 'sgd', '--seeds', '5', *words)


def test_a_folder_in_which_nothing_has_trained_takes_other_arguments(trial):
    trial('--lr', '0.1', '--arms', 'init', '--epochs', '3')
    runs = trial('--lr', '0.2', '--arms', 'sgd', '--batch-size', '7')
    found = read_results(runs.folder)
    assert (found.settings.arms, found.settings.lr, found.shared.batch_size) == (('sgd',), 0.2, 7)


def test_a_network_that_cannot_be_made_changes_nothing(images, trained, tmp_path, capsys):
    words = ['--data', str(images), '--device', 'cpu', '--lr', '0.1', '--channels-last', '--img-size', '96']
    folder = trained(*words, '--arms', 'sgd').folder
    before = (folder / 'trial.yaml').read_text()
    assert main(['trial', TINY, *words, '--output', str(folder), '--arms', 'branches']) == 1
    assert 'corrupts memory' in capsys.readouterr().err
    assert (folder / 'trial.yaml').read_text() == before
    fresh = tmp_path / 'fresh'
    assert main(['trial', TINY, *words, '--output', str(fresh), '--model-kwargs', 'nonsense=1']) == 1
    assert 'timm cannot make' in capsys.readouterr().err
    assert not (fresh / 'trial.yaml').exists()


def test_a_reference_stays_until_another_is_named(trial, trained):
    words = ['--lr', '0.1', '--arms', 'sgd', 'init', 'repopt']
    folder = trained(*words, '--reference', 'init').folder
    trial(*words, '--seeds', '5')
    assert read_saved_settings(folder).reference == 'init'
    trial(*words, '--seeds', '5', '--reference', 'repopt')
    assert read_saved_settings(folder).reference == 'repopt'


def test_arms_without_a_search_leave_what_the_search_was(trial, trained):
    folder = trained('--lr', '0.1', '--arms', 'sgd', 'search', '--search', '3', '--search-kwargs', 'lr=0.3').folder
    trial('--lr', '0.1', '--arms', 'sgd', '--seeds', '5')
    found = read_saved_settings(folder)
    assert (found.search, found.search_kwargs['lr'], len(found.seeds)) == (3, 0.3, 5)
    with pytest.raises(ValueError, match='search 3 -> 4'):
        trial('--lr', '0.1', '--arms', 'search', '--search', '4', '--search-kwargs', 'lr=0.3')


def test_given_scales_have_an_arm_each(trial, trained):
    words = ['--lr', '0.1', '--scales', 'mine.safetensors', 'published=b1.csv', '--arms']
    runs = trained(*words, 'published', 'scales', 'sgd', '--reference', 'published')
    assert runs.settings.arms == ('sgd', 'scales', 'published')
    given = {arm: runs.training(arm, 0, 0.1).arguments.get('scales') for arm in runs.settings.arms}
    assert given == {'sgd': None, 'scales': 'mine.safetensors', 'published': 'b1.csv'}
    trial('--lr', '0.1', '--scales', 'third=c.csv')
    assert read_results(runs.folder).settings.arms[-3:] == ('scales', 'published', 'third')
    assert read_results(runs.folder).settings.scales['published'] == 'b1.csv'
    with pytest.raises(ValueError, match=r'published.*b1\.csv.* -> .*b2\.csv'):
        trial('--lr', '0.1', '--scales', 'published=b2.csv')


def test_a_folder_of_an_older_trial_has_one_source_of_scales(trial, trained):
    runs = trained('--lr', '0.1', '--scales', 'x')
    path = runs.folder / 'trial.yaml'
    path.write_text(path.read_text().replace('scales:\n  scales: x', 'scales: x'))
    assert 'scales: x\n' in path.read_text()
    assert read_results(runs.folder).settings.scales == {'scales': 'x'}
    trial('--lr', '0.1', '--scales', 'x', '--seeds', '5')
