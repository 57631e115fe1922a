import csv
import json

import pytest

from repopt_timm import Scales
from repopt_timm.cli import main
from repopt_timm.trial.networks import make_network
from repopt_timm.trial.pictures import draw_trials
from repopt_timm.trial.report import report_trial, report_trials
from repopt_timm.trial.results import TrialResult

from .conftest import fake_run, run_trial

COSTS = {'parameters': 1e6, 'activations': 2e6, 'convolutions': 6, 'step_seconds': 0.1}


def report(made):
    return report_trial(TrialResult(made.folder))


def reports(*trials):
    return report_trials([TrialResult(each.folder) for each in trials], trials[0].folder / 'report')


@pytest.fixture
def finished(trial):
    """Makes a trial of sgd and arms with gains over it, one for each seed; None diverged."""

    def make(gains, *words, convolutions=6, folder='trial'):
        seeds = str(max(map(len, gains.values())))
        made = trial('--arms', 'sgd', *gains, '--lr', '0.1', '--epochs', '4', '--seeds', seeds, *words, folder=folder)
        for arm, own in {'sgd': [0.0] * int(seeds), **gains}.items():
            for seed, gain in enumerate(own):
                # Seeds vary by 3 points, paired differences by much less.
                fake_run(made.training(arm, seed, 0.1), None if gain is None else 50 + 3 * seed + gain)
        costs = {arm: {**COSTS, 'convolutions': convolutions} for arm in made.arms}
        (made.folder / 'networks.json').write_text(json.dumps(costs) + '\n')
        return made

    return make


GAINS = {
    'repopt': [1.0, 1.1, 0.9],
    'init': [-1.0, -1.1, -0.9],
    'dirac': [2.0, -1.0, 0.5],
    'identity': [1.0, None, 1.1],
    'branches': [None, 2.0, None],
    'unit_branches': [None, None, None],
    'adamw': [],
}
SENTENCES = """
repopt is better than sgd by 1.00 points (+1.00 points, 95 % interval +0.75 to +1.25, 3 seeds).
init is worse than sgd by 1.00 points
dirac and sgd: no difference that 3 seeds can show (+0.50 points, 95 % interval -3.23 to +4.23).
About 7 seeds would show 2 points, or 22 if the spread is underestimated.
identity is better than sgd by 1.05 points, among the seeds that did not diverge (+1.05
1 of 3 runs of identity diverged; its mean is that of the others.
branches and sgd, among the seeds that did not diverge: one seed, +2.00 points. One seed cannot say
unit_branches and sgd: no seed has finished runs of both
3 of 3 runs of unit_branches diverged.
3 of 3 runs of adamw are not finished.
| repopt: RepOptSGD, unsearched scales                       | 0.1   | 3     | 54.00 (46.67 to 61.33)
54.05 (15.30 to 92.80), diverged: 1
| all diverged
"""


def test_a_report_says_in_plain_words_what_the_arms_show(finished, capsys):
    folder = finished(GAINS).folder
    assert main(['trial', '--report', str(folder)]) == 0
    text = (folder / 'report.md').read_text()
    assert text in capsys.readouterr().out
    assert [line for line in SENTENCES.strip().splitlines() if line not in text] == []
    assert '2.00 MB' in text and '1.00 M' in text and '1.00 x' in text
    values = json.loads((folder / 'report.json').read_text())['arms']['repopt']
    assert values['top1'] == {'0': 51.0, '1': 54.1, '2': 56.9}
    assert values['difference']['mean'] == pytest.approx(1.0)
    rows = list(csv.DictReader((folder / 'epochs.csv').open()))
    assert len(rows) == 4 * 3 * 7 and rows[-1]['train_seconds'] == '1.0'
    assert (folder / 'report.png').stat().st_size > 10_000
    assert main(['trial', '--report', str(folder), '--reference', 'repopt']) == 0
    assert 'sgd is worse than repopt' in capsys.readouterr().out
    assert main(['trial', '--report', str(folder), '--reference', 'search']) == 1


def test_a_search_that_diverged_is_said_to_have(trial):
    made = trial('--arms', 'sgd', 'search', '--search', '2', '--lr', '0.1', '--epochs', '2', '--seeds', '2')
    run_trial(made, lambda run: None if run.kind == 'searches' and run.folder.name == 'seed-1' else 40)
    (made.training('search', 0, 0.1).search.folder / 'scales.safetensors').unlink()
    text = report(made)
    assert 'The search in searches/seed-1 diverged, and what needs its scales does not train' in text
    assert '1 of 2 runs of search diverged; its mean is that of the others.' in text
    assert 'search and sgd, among the seeds that did not diverge: one seed' in text and 'are not finished' not in text


def test_arms_without_a_good_learning_rate_are_named(trial):
    made = trial('--arms', 'sgd', 'repopt', 'search', '--search', '2', '--epochs', '2', '--seeds', '1')
    run_trial(made, lambda run: 10 * run.arguments['lr'] if run.folder.parent.name == 'sgd' else None)
    text = report(made)
    assert 'The learning rate of sgd, 1.6, is at the edge of what was tried' in text
    assert 'repopt diverged at every learning rate that was tried.' in text
    assert 'The search in searches/tuning diverged' in text and '| all diverged ' in text
    assert text.count('every learning rate') == 1 and 'are not finished' not in text


def test_arms_of_one_network_take_one_time_and_a_search_counts_among_its_arms(trial):
    words = ['--lr', '0.1', '--epochs', '4', '--seeds', '1']
    made = trial('--arms', 'branches', 'init', 'repopt', 'search', '--search', '3', *words)
    fake_run(made.training('search', 0, 0.1).search, 30, seconds=5)
    for arm, seconds in (('branches', 4), ('init', 3), ('repopt', 1), ('search', 2)):
        fake_run(made.training(arm, 0, 0.1), 40, seconds=seconds)
    (made.folder / 'searches/seed-0/scales.safetensors').unlink()
    seconds = {name: arm.seconds for name, arm in TrialResult(made.folder).arms.items()}
    assert seconds == {'branches': 16, 'init': 8, 'repopt': 8, 'search': 23}


def test_it_is_said_what_the_searches_did(trial):
    made = trial('--arms', 'sgd', 'search', '--search', '2', '--lr', '0.1', '--seeds', '2')
    initial = Scales.initial(make_network(made))
    for seed in (0, 1):
        folder = made.training('search', seed, 0.1).search.folder
        folder.mkdir(parents=True)
        vectors = {m: {b: v * (1.01 + seed / 100) for b, v in initial[m].items()} for m in initial}
        Scales(initial.architecture, vectors, initial.geometry, initial.counts).save(folder / 'scales.safetensors')
    text = report(made)
    assert 'The search left the scales where they started' in text
    assert 'moved by 1.5% on average' in text and 'from search to search they differ by 0.7%' in text


def test_trials_of_several_depths_have_one_report(finished, tmp_path):
    shallow = finished({'repopt': [0.1, -0.1]}, folder='shallow')
    deep = finished({'repopt': [2.0, 2.2]}, '--train-images', '9', folder='deep', convolutions=20)
    folders = [str(deep.folder), str(shallow.folder)]
    assert main(['trial', '--report', *folders, '--output', str(tmp_path / 'both')]) == 0
    lines = (tmp_path / 'both/report.md').read_text().splitlines()
    cells = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines if line.startswith('| ')]
    assert [row[:3] for row in cells[2:4]] == [['shallow', '6', '4'], ['deep', '20', '4']]
    assert cells[-1][:4] == ['deep', '20', '4', 'repopt'] and cells[-1][7].startswith('+2.10 (')
    assert len((tmp_path / 'both/epochs.csv').read_text().splitlines()) == 1 + 2 * 16
    for results, panels in ([deep, shallow], ['convolutions', 'seconds']), ([deep, deep], ['seconds']):
        figure = draw_trials([TrialResult(each.folder) for each in results], tmp_path / 'picture.png')
        assert [axes.get_xlabel().split()[0] for axes in figure.axes] == panels


def test_trials_in_folders_of_one_name_are_told_apart(finished, tmp_path):
    made = [finished({'repopt': [0.1, -0.1]}, folder=f'{parent}/same') for parent in 'ab']
    reports(*made)
    folder = made[0].folder / 'report'
    with (folder / 'epochs.csv').open() as file:
        assert {row['trial'] for row in csv.DictReader(file)} == {'a/same', 'b/same'}
    assert json.loads((folder / 'report.json').read_text()).keys() == {'a/same', 'b/same'}


def test_budgets_are_compared_at_equal_wall_time(trial):
    def make(epochs, top1, *words, folder):
        more = ['--arms', 'branches', 'repopt', '--lr', '0.1', '--epochs', epochs, '--seeds', '2']
        made = trial(*more, *words, folder=folder)
        for seed in (0, 1):
            fake_run(made.training('branches', seed, 0.1), top1 + seed, seconds=4)
            fake_run(made.training('repopt', seed, 0.1), top1 + 1 + seed)
        return made

    short = make('2', 40, folder='short')
    longest = make('16', 80, '--val-interval', '8', folder='longest')
    text = reports(short, make('8', 60, '--val-interval', '4', folder='long'), longest)
    assert '| 2      | 40.50 (34.15 to 46.85) | 41.50 (35.15 to 47.85) |' in text
    assert 'repopt in 8 epochs (8 s) and branches in 2 epochs (8 s): +21.00 (21.00 to 21.00) points, 2 seeds.' in text
    assert 'repopt in 16 epochs (16 s) and branches in 2' not in text
    assert '## Equal wall time' not in reports(short, make('8', 60, '--batch-size', '9', folder='other'))


@pytest.mark.filterwarnings('error')
def test_a_report_before_the_first_validation_or_run_is_without_warnings(trial, caplog):
    made = trial('--arms', 'sgd', 'repopt', '--epochs', '2', '--lr', '0.1', '--seeds', '1')
    folder = made.training('sgd', 0, 0.1).folder
    folder.mkdir(parents=True)
    (folder / 'summary.csv').write_text('epoch,train_loss\n1,2.0\n')
    assert '1 of 1 runs of sgd are not finished' in report(made)
    fresh = trial('--arms', 'sgd', folder='fresh')
    assert '3 of 3 runs of sgd are not finished.' in report(fresh)
    reports(made, fresh)
    assert not caplog.records and (fresh.folder / 'report.png').exists()
