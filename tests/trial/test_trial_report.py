import csv
import json

import pytest

from repopt_timm import Scales
from repopt_timm.cli import main
from repopt_timm.trial.combined import combined_report
from repopt_timm.trial.networks import NETWORKS_FILE, plain_network
from repopt_timm.trial.results import read_results
from repopt_timm.trial.trial_report import report_trial, report_trials, trial_text

from .conftest import fake_run, run_trial, write_summary

ARMS = ['--arms', 'sgd', 'repopt', '--lr', '0.1', '--epochs', '4']


def network(seconds, convolutions=6):
    return {'parameters': 1e6, 'activations': 2e6, 'convolutions': convolutions, 'step_seconds': seconds}


@pytest.fixture
def finished(trial):
    """Makes a trial whose arm repopt is better than sgd by `gains`, one for each seed, and takes as long."""

    def make(gains, *words, folder='trial', convolutions=6, seconds=1.0):
        runs = trial(*ARMS, '--seeds', str(len(gains)), *words, folder=folder)
        for seed, gain in enumerate(gains):
            fake_run(runs.training('sgd', seed, 0.1), 50 + 3 * seed, seconds)
            fake_run(runs.training('repopt', seed, 0.1), None if gain is None else 50 + 3 * seed + gain, seconds)
        numbers = {arm: network(0.1, convolutions) for arm in runs.settings.arms}
        (runs.folder / NETWORKS_FILE).write_text(json.dumps(numbers))
        return runs

    return make


@pytest.mark.parametrize(
    ('gains', 'sentence'),
    [
        # Seeds vary by 3 points, paired differences by 0.1.
        (
            [1.0, 1.1, 0.9],
            'repopt is better than sgd by 1.00 points (+1.00 points, 95 % interval +0.75 to +1.25',
        ),
        ([-1.0, -1.1, -0.9], 'repopt is worse than sgd by 1.00 points'),
        ([1.0, -1.0, 0.3], 'repopt and sgd: no difference that 3 seeds can show (+0.10 points'),
        ([2.0], 'repopt and sgd: one seed, +2.00 points. One seed cannot say'),
        ([1.0, None, 1.2], '1 of 3 runs of repopt diverged; its mean is that of the others.'),
        ([None, 2.0], 'repopt and sgd, among the seeds that did not diverge: one seed, +2.00 points'),
        ([1.0, None, 1.1], 'repopt is better than sgd by 1.05 points, among the seeds that did not diverge (+1.05'),
        ([1.0, None, -1.0], 'repopt and sgd, among the seeds that did not diverge: no difference that 2 seeds'),
        ([None, None], 'repopt and sgd: no seed with which both are finished'),
        ([None, None], '2 of 2 runs of repopt diverged.'),
    ],
)
def test_the_verdict_is_in_plain_words(finished, gains, sentence):
    text = trial_text(read_results(finished(gains).folder))
    assert sentence in text
    assert ('diverged' in text) == (None in gains)


@pytest.mark.parametrize(
    ('gains', 'cell'), [([1.0, None, 1.0], '54.00 (15.88 to 92.12), diverged: 1'), ([None, None], 'all diverged')]
)
def test_runs_that_diverged_are_beside_the_mean(finished, gains, cell):
    result = read_results(finished(gains).folder)
    rows = [line for line in combined_report([result]).splitlines() if line.startswith('| trial ')]
    assert cell in rows[1] and cell in rows[-1] and cell in trial_text(result)


def test_runs_that_have_not_begun_are_not_counted_as_diverged(trial):
    runs = trial(*ARMS, '--seeds', '2')
    fake_run(runs.training('repopt', 0, 0.1), None)
    rows = combined_report([read_results(runs.folder)]).splitlines()
    assert rows[6].split('|')[4:6] == [' -   ', ' diverged: 1 ']


def test_a_search_that_diverged_is_said_to_have(trial):
    runs = trial('--arms', 'sgd', 'search', '--search', '2', '--lr', '0.1', '--epochs', '2', '--seeds', '2')
    run_trial(runs, lambda run: None if run.folder.name == 'seed-1' and 'searches' in run.folder.parts else 40)
    (runs.training('search', 0, 0.1).after.result).unlink()
    text = trial_text(read_results(runs.folder))
    found = 'The search in searches/seed-1 diverged, and what needs its scales does not train: The training loss of'
    assert found in text and '--search-kwargs lr=..., or with' in text
    assert '1 of 2 runs of search diverged; its mean is that of the others.' in text
    assert 'search and sgd, among the seeds that did not diverge: one seed' in text and 'are not finished' not in text


def test_an_arm_whose_choice_of_a_learning_rate_lacks_its_search_is_said_to(trial):
    runs = trial('--arms', 'sgd', 'search', '--search', '2', '--epochs', '2', '--seeds', '2')
    run_trial(runs, lambda run: None if 'searches' in run.folder.parts else 40)
    text = trial_text(read_results(runs.folder))
    assert 'The search in searches/tuning diverged' in text and '| all diverged ' in text
    assert 'every learning rate' not in text and 'are not finished' not in text


def test_a_report_is_made_while_learning_rates_are_chosen(trial):
    runs = trial('--arms', 'sgd', 'repopt', '--epochs', '2', '--cooldown-epochs', '2', '--seeds', '1')
    run = runs.tuning('sgd', 0.1)
    run.folder.mkdir(parents=True)
    (run.folder / 'summary.csv').write_text('epoch,train_loss,eval_top1\n1,2.0,\n2,2.0,\n')
    assert '1 of 1 runs of sgd are not finished' in trial_text(read_results(runs.folder))


def test_a_report_is_a_table_json_raw_data_and_a_picture(finished, capsys):
    runs = finished([1.0, 1.2])
    assert main(['trial', '--report', str(runs.folder)]) == 0
    text = (runs.folder / 'report.md').read_text()
    assert text in capsys.readouterr().out
    assert '| repopt: RepOptSGD, unsearched scales | 0.1 | 2     | 52.60 (' in text
    assert '2.00 MB' in text and '1.00 M' in text and '1.00 x' in text
    values = json.loads((runs.folder / 'report.json').read_text())
    assert values['arms']['repopt']['top1'] == {'0': 51.0, '1': 54.2}
    assert values['arms']['repopt']['difference']['mean'] == pytest.approx(1.1)
    rows = list(csv.DictReader((runs.folder / 'epochs.csv').open()))
    assert len(rows) == 2 * 2 * 4 and rows[-1]['eval_top1'] == '54.2' and rows[-1]['train_seconds'] == '1.0'
    assert (runs.folder / 'report.png').stat().st_size > 10_000


def test_a_trial_that_goes_on_has_a_report_of_what_is_there(trial):
    runs = trial(*ARMS, '--seeds', '2')
    fake_run(runs.training('sgd', 0, 0.1), 50)
    assert '2 of 2 runs of repopt are not finished' in trial_text(read_results(runs.folder))


def test_a_learning_rate_at_the_edge_is_said_to_be_there(trial):
    runs = trial('--arms', 'sgd', 'repopt', '--seeds', '1')
    run_trial(runs, lambda run: 10 * run.arguments['lr'] if run.arguments['opt'] == 'sgd' else None)
    text = trial_text(read_results(runs.folder))
    assert 'The learning rate of sgd, 1.6, is at the edge of what was tried' in text
    assert 'repopt diverged at every learning rate that was tried.' in text


def test_arms_are_compared_at_the_wall_time_of_the_fastest(trial):
    runs = trial('--arms', 'branches', 'repopt', '--lr', '0.1', '--epochs', '4', '--seeds', '1')
    fake_run(runs.training('branches', 0, 0.1), 40, seconds=2)
    fake_run(runs.training('repopt', 0, 0.1), 40, seconds=1)
    text = trial_text(read_results(runs.folder))
    assert '| branches | 8 s                | 2 of 4                 | 20.00               |' in text
    assert '| repopt   | 4 s                | 4 of 4                 | 40.00               |' in text


def test_arms_of_one_network_take_one_time_whatever_else_the_machine_did(trial):
    runs = trial('--arms', 'branches', 'init', 'repopt', '--lr', '0.1', '--epochs', '4', '--seeds', '1')
    for arm, seconds in (('branches', 4), ('init', 3), ('repopt', 1)):
        fake_run(runs.training(arm, 0, 0.1), 40, seconds=seconds)
    found = read_results(runs.folder)
    assert {name: arm.epoch_seconds for name, arm in found.arms.items()} == {'branches': 4, 'init': 2, 'repopt': 2}
    text = trial_text(found)
    assert 'epochs in 8 s (init, repopt)' in text
    assert '| repopt   | 8 s                | 4 of 4 ' in text and '| init     | 8 s                | 4 of 4 ' in text


def test_a_search_counts_among_the_time_of_its_arm(trial):
    runs = trial('--arms', 'sgd', 'search', '--search', '3', '--lr', '0.1', '--epochs', '4', '--seeds', '1')
    write_summary(runs.training('search', 0, 0.1).after.folder, [10, 20, 30], seconds=2)
    for arm in ('sgd', 'search'):
        fake_run(runs.training(arm, 0, 0.1), 40, seconds=1)
    found = read_results(runs.folder)
    assert (found.arms['sgd'].seconds(4), found.arms['search'].seconds(4)) == (4, 10)
    text = trial_text(found)
    assert '| search | 10 s               | 0 of 4              | -                   |' in text
    text = combined_report([found])
    assert 'the training time of one run and of its search.' in text and '| 10 s      |' in text


def test_it_is_said_what_the_searches_did(trial):
    runs = trial('--arms', 'sgd', 'search', '--search', '2', '--lr', '0.1', '--seeds', '2')
    initial = Scales.initial(plain_network(runs))
    for seed in (0, 1):
        search = runs.training('search', seed, 0.1).after
        search.folder.mkdir(parents=True)
        vectors = {m: {b: v * (1.01 + seed / 100) for b, v in initial[m].items()} for m in initial}
        Scales(initial.architecture, vectors, initial.geometry, initial.counts).save(search.result)
    text = trial_text(read_results(runs.folder))
    assert 'The search left the scales where they started' in text
    assert 'moved by 1.5% on average' in text and 'from search to search they differ by 0.7%' in text


def test_another_arm_can_be_the_reference(finished):
    runs = finished([1.0, 1.2])
    assert 'sgd and repopt: no difference' in trial_text(read_results(runs.folder, 'repopt'))
    with pytest.raises(ValueError, match='has no arm init'):
        read_results(runs.folder, 'init')


def test_trials_of_several_depths_have_one_report(finished, tmp_path):
    shallow = finished([0.1, -0.1], folder='shallow')
    deep = finished([2.0, 2.2], '--train-images', '9', folder='deep', convolutions=20)
    folders = [str(deep.folder), str(shallow.folder)]
    assert main(['trial', '--report', *folders, '--output', str(tmp_path / 'both')]) == 0
    lines = (tmp_path / 'both/report.md').read_text().splitlines()
    cells = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines if line.startswith('| ')]
    assert [row[:3] for row in cells[2:4]] == [['shallow', '6', '4'], ['deep', '20', '4']]
    assert [row[:4] for row in cells[6:]] == [
        ['shallow', '6', '4', 'sgd'],
        ['shallow', '6', '4', 'repopt'],
        ['deep', '20', '4', 'sgd'],
        ['deep', '20', '4', 'repopt'],
    ]
    assert cells[-1][7].startswith('+2.10 (')
    assert (tmp_path / 'both/report.png').stat().st_size > 10_000
    assert len((tmp_path / 'both/epochs.csv').read_text().splitlines()) == 1 + 2 * 16


def test_budgets_are_compared_at_equal_wall_time(trial):
    def make(epochs, top1, *words, folder):
        more = ['--arms', 'branches', 'repopt', '--lr', '0.1', '--epochs', epochs, '--seeds', '2']
        runs = trial(*more, *words, folder=folder)
        for seed in (0, 1):
            fake_run(runs.training('branches', seed, 0.1), top1 + seed, seconds=4)
            fake_run(runs.training('repopt', seed, 0.1), top1 + 1 + seed, seconds=1)
        return read_results(runs.folder)

    short = make('2', 40, folder='short')
    text = combined_report([short, make('8', 60, '--val-interval', '4', folder='long')])
    assert '| 2      | 40.50 (34.15 to 46.85) | 41.50 (35.15 to 47.85) |' in text
    assert 'repopt in 8 epochs (8 s) and branches in 2 epochs (8 s): +21.00 (21.00 to 21.00) points, 2 seeds.' in text
    assert '## Equal wall time' not in combined_report([short, make('8', 60, '--batch-size', '9', folder='other')])


@pytest.mark.filterwarnings('error')
def test_a_report_before_the_first_run_is_without_warnings(trial, caplog):
    folder = trial('--arms', 'sgd', 'repopt').folder
    assert '3 of 3 runs of sgd are not finished.' in report_trial(read_results(folder))
    report_trials([read_results(folder)], folder / 'several')
    assert not caplog.records and (folder / 'report.png').exists()


def test_a_folder_of_trials_names_them(trial, tmp_path, capsys):
    for name in ('deep', 'shallow'):
        trial(folder=name)
    assert main(['trial', '--report', str(tmp_path)]) == 1
    assert f"It holds deep, shallow, which are: name them, such as '{tmp_path}/deep'." in capsys.readouterr().err


@pytest.mark.parametrize(
    ('words', 'error'),
    [
        (['--report', '{}', '--seeds', '2'], '--report goes with --output and --reference alone, not with seeds'),
        (['--report', '{}', '{}'], '--report of several trials needs --output'),
        (['--report', '{}/nowhere'], 'is not the folder of a trial'),
        ([], 'Name the MODEL of a trial'),
    ],
)
def test_a_report_that_cannot_be_is_refused(words, error, tmp_path, capsys):
    assert main(['trial', *(word.format(tmp_path) for word in words)]) == 1
    assert error in capsys.readouterr().err
