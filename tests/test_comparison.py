import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / 'pretrained' / 'comparison' / 'compare.py'


@pytest.fixture(scope='module')
def compare():
    spec = importlib.util.spec_from_file_location('compare', SCRIPT)
    module = sys.modules['compare'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules['compare']


def test_the_readme_tells_what_the_runs_reached(compare):
    assert compare.table() in compare.README.read_text(encoding='utf-8')


def test_each_arm_has_the_learning_rate_that_was_best(compare, monkeypatch, tmp_path):
    (tmp_path / 'tuning.csv').write_text('arm,lr,top1\nplain,0.025,61.5\nplain,0.05,9.75\nrepvgg,0.1,63\n')
    monkeypatch.setattr(compare, 'TUNING', tmp_path / 'tuning.csv')
    assert compare.best_rates() == {'plain': 0.025, 'repvgg': 0.1}


def test_a_split_holds_out_a_tenth_of_each_class_of_the_training_images(compare, tmp_path):
    for label in ('cat', 'dog'):
        for index in range(20):
            image = tmp_path / 'data' / 'train' / label / f'{index:02}.jpg'
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_text(label)
    compare.split(tmp_path / 'data', tmp_path / 'split')
    held_out = sorted(path.relative_to(tmp_path / 'split') for path in (tmp_path / 'split').glob('validation/*/*'))
    assert list(map(str, held_out)) == [
        f'validation/{label}/{name}.jpg' for label in ('cat', 'dog') for name in ('09', '19')
    ]
    assert len(list((tmp_path / 'split').glob('train/*/*'))) == 36
    assert (tmp_path / 'split' / held_out[0]).read_text() == 'cat'
