import shutil

import pytest
from PIL import Image

from repopt_timm.train import run
from repopt_timm.train.loaders import make_datasets, write_digits
from repopt_timm.train.parsing import parse_arguments


def test_the_digits_are_written_once_as_an_image_folder(tmp_path):
    write_digits(tmp_path)
    pictures = list(tmp_path.rglob('*.png'))
    assert len(pictures) == 1797
    assert len(list(tmp_path.glob('validation/*/*.png'))) == 450
    assert Image.open(pictures[0]).size == (8, 8)
    pictures[0].unlink()
    write_digits(tmp_path)
    assert not pictures[0].exists()


@pytest.fixture
def selected(arguments):
    """Makes the data sets of a run."""
    return lambda extra='': make_datasets(parse_arguments(arguments(extra)))


@pytest.fixture
def unequal(images, tmp_path):
    """One class has 24 images and the other two."""
    shutil.copytree(images, tmp_path / 'unequal')
    for path in sorted((tmp_path / 'unequal/train/dark').iterdir())[2:]:
        path.unlink()
    return ['--data-dir', str(tmp_path / 'unequal')]


def paths(dataset):
    return {dataset.dataset.files[index] for index in dataset.indices}


def test_a_part_of_the_training_images_is_the_same_for_all_seeds_and_apart_from_what_is_held_out(selected):
    few, validation = selected('--train-images 20')
    assert len(few) == len(paths(few)) == 20 and len(validation) == 16
    assert paths(few) == paths(selected('--train-images 20 --seed 7')[0])
    train, held_out = selected('--holdout 0.25')
    assert (len(train), len(held_out)) == (36, 12) and len(paths(train) | paths(held_out)) == 48
    # There are enough beside a small part of the training images.
    few, others = selected('--holdout 0.25 --train-images 20')
    assert paths(others) == paths(held_out) and paths(few) <= paths(train) and len(few) == 20


def test_cached_images_are_decoded_once_and_stay_as_they_are(selected, monkeypatch):
    plain, cached = selected()[0], selected('--cache-images')[0]
    for _ in range(2):
        assert all(a.tobytes() == b.tobytes() and x == y for (a, x), (b, y) in zip(plain, cached))
        monkeypatch.setattr(cached, 'dataset', None)


def test_splits_that_number_their_classes_differently_are_refused(unequal, tmp_path):
    shutil.rmtree(tmp_path / 'unequal/train/dark')
    with pytest.raises(ValueError, match='dark'):
        make_datasets(parse_arguments(unequal))


def test_classes_of_unequal_size_are_told_and_weighed_on_request(unequal, caplog):
    caplog.set_level('INFO')
    for extra in ([], ['--class-weights', 'balanced']):
        args = parse_arguments([*unequal, *extra])
        loss = run.make_loss(args, make_datasets(args)[0], 2)
    assert caplog.text.count('largest class has 24 images, the smallest 2') == 1
    assert loss.weight.tolist() == pytest.approx([26 / 4, 26 / 48])


def test_labels_that_are_mixed_are_smoothed_once(images):
    for words, smoothing in (([], 0.1), (['--mixup', '0.2'], 0.0)):
        args = parse_arguments([str(images), *words])
        assert run.make_loss(args, make_datasets(args)[0], 2).label_smoothing == smoothing


def test_a_balanced_sampler_draws_all_classes_alike_and_others_each_epoch(unequal):
    train, validation = make_datasets(parse_arguments([*unequal, '--sampler', 'balanced']))
    drawn = []
    for epoch in range(40):
        train.set_epoch(epoch)
        drawn.append([label for _, label in train])
    assert len(train) == 26 and len(set(map(tuple, drawn))) > 30
    assert sum(map(sum, drawn)) / (40 * 26) == pytest.approx(0.5, abs=0.05)
    assert len(validation) == 16
