from pathlib import Path

import pytest
from PIL import Image

from repopt_timm.train.command import main
from repopt_timm.train.loaders import make_datasets, write_digits
from repopt_timm.train.parsing import parse_arguments

from .runs import assert_same_bits, read


def test_the_digits_are_written_once_as_an_image_folder(tmp_path):
    write_digits(tmp_path)
    pictures = list(tmp_path.rglob('*.png'))
    assert len(pictures) == 1797
    assert len(list(Path(tmp_path / 'validation').rglob('*.png'))) == 450
    assert Image.open(pictures[0]).size == (8, 8)
    pictures[0].unlink()
    write_digits(tmp_path)
    assert not pictures[0].exists()


@pytest.fixture
def selected(arguments):
    """Makes the data sets of a run, and checks that their images are those of the folder's split."""

    def make(*extra):
        return make_datasets(parse_arguments(arguments(*extra)))

    return make


def paths(dataset):
    return {dataset.dataset.files[index] for index in dataset.indices}


def test_a_part_of_the_training_images_is_the_same_for_all_seeds(selected):
    first, validation = selected('--train-images', '20')
    second, _ = selected('--train-images', '20', '--seed', '7')
    assert len(paths(first)) == len(first) == 20 and paths(first) == paths(second)
    assert len(validation) == 16


def test_held_out_images_are_training_images_that_are_not_trained_on(selected):
    train, held_out = selected('--holdout', '0.25')
    assert (len(train), len(held_out)) == (36, 12)
    assert len(paths(train) | paths(held_out)) == 48
    # There are enough beside a small part of the training images.
    few, others = selected('--holdout', '0.25', '--train-images', '20')
    assert paths(others) == paths(held_out) and paths(few) <= paths(train) and len(few) == 20


def test_cached_images_are_decoded_once_and_stay_as_they_are(selected, arguments, tmp_path, monkeypatch):
    plain, cached = selected()[0], selected('--cache-images')[0]
    for _ in range(2):
        assert all(a.tobytes() == b.tobytes() and x == y for (a, x), (b, y) in zip(plain, cached))
        monkeypatch.setattr(cached, 'dataset', None)


def test_a_run_with_cached_images_ends_with_the_same_bits(arguments, tmp_path):
    for name, extra in (('plain', []), ('cached', ['--cache-images'])):
        main(arguments('--scales', 'initial', '--epochs', '2', *extra, experiment=name))
    assert_same_bits(read(tmp_path / 'plain')['state_dict'], read(tmp_path / 'cached')['state_dict'])
