import pytest

from repopt_timm.trial.results import read_results


def test_a_folder_takes_one_trial_only(trial):
    trial('--lr', '0.1')
    trial('--lr', '0.1', '--seeds', '5', '--arms', 'sgd', '--workers', '0')
    trial('--lr', '0.1', '--search', '3')
    for words, name in ((['--lr', '0.2'], 'lr 0.1 -> 0.2'), (['--lr', '0.1', '--epochs', '9'], 'epochs 10 -> 9')):
        with pytest.raises(ValueError, match=name):
            trial(*words)


def test_given_scales_have_an_arm_each(trial):
    words = ['--lr', '0.1', '--scales', 'mine.safetensors', 'published=b1.csv', '--arms']
    runs = trial(*words, 'published', 'scales', 'sgd', '--reference', 'published')
    assert runs.settings.arms == ('sgd', 'scales', 'published')
    given = {arm: runs.training(arm, 0, 0.1).arguments.get('scales') for arm in runs.settings.arms}
    assert given == {'sgd': None, 'scales': 'mine.safetensors', 'published': 'b1.csv'}
    trial('--lr', '0.1', '--scales', 'third=c.csv')
    assert read_results(runs.folder).settings.arms[-3:] == ('scales', 'published', 'third')
    assert read_results(runs.folder).settings.scales['published'] == 'b1.csv'
    with pytest.raises(ValueError, match=r'published.*b1\.csv.* -> .*b2\.csv'):
        trial('--lr', '0.1', '--scales', 'published=b2.csv')


def test_a_folder_of_an_older_trial_has_one_source_of_scales(trial):
    runs = trial('--lr', '0.1', '--scales', 'x')
    path = runs.folder / 'trial.yaml'
    path.write_text(path.read_text().replace('scales:\n  scales: x', 'scales: x'))
    assert 'scales: x\n' in path.read_text()
    assert read_results(runs.folder).settings.scales == {'scales': 'x'}
    trial('--lr', '0.1', '--scales', 'x', '--seeds', '5')
