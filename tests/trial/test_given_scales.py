from dataclasses import replace

import pytest

from repopt_timm import Scales
from repopt_timm.trial.given_scales import read_fingerprints
from repopt_timm.trial.networks import plain_network
from repopt_timm.trial.trial_folder import joined_settings, write_settings
from repopt_timm.trial.trial_runs import TrialRuns

from ..helpers import spread
from .conftest import fake_run, run_trial


@pytest.fixture
def given(trial, tmp_path):
    """Makes a trial with given scales, and returns its runs and the file."""

    def make(*words):
        path = tmp_path / 'mine.safetensors'
        runs = trial('--arms', 'sgd', 'mine', '--scales', f'mine={path}', '--lr', '0.1', *words)
        Scales.initial(plain_network(runs)).save(path)
        return runs, path

    return make


def test_scales_are_read_as_long_as_something_trains_with_them(given):
    runs, path = given('--seeds', '2')
    initial = Scales.initial(plain_network(runs))
    assert read_fingerprints(runs, 10) == {'mine': initial.fingerprint}
    run_trial(runs, lambda run: 50)
    path.unlink()
    assert read_fingerprints(runs, 10) == {}


def test_a_file_that_cannot_be_read_is_an_error_before_anything_trains(given):
    runs, path = given('--seeds', '2')
    path.unlink()
    with pytest.raises(FileNotFoundError, match='No scales found'):
        read_fingerprints(runs, 10)


def test_scales_that_changed_are_refused(given):
    runs, path = given('--seeds', '1')
    fake_run(runs.training('mine', 0, 0.1), 50)

    def call(seeds):
        more = replace(runs.settings, seeds=tuple(range(seeds)))
        found = read_fingerprints(TrialRuns(runs.folder, more, runs.shared), 10)
        joined = joined_settings(runs.folder, replace(more, fingerprints=found), runs.shared)
        write_settings(runs.folder, joined, runs.shared)
        return joined.fingerprints

    # The folder is like that of an older trial, without fingerprints.
    known = call(2)
    assert list(known) == ['mine']
    spread(Scales.initial(plain_network(runs))).save(path)
    with pytest.raises(ValueError, match=rf"mine=.* are the scales .*, but '.*' has trained with {known['mine'][:12]}"):
        call(3)
    Scales.initial(plain_network(runs)).save(path)
    assert call(3) == known
