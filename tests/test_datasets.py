import os
import pickle
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from repopt_timm.datasets import (
    check_same_classes,
    class_names,
    count_classes,
    data_config_of,
    open_folder,
    read_class_map,
)

from .helpers import tiny_model, write_tar


@pytest.mark.parametrize(
    ('told', 'count', 'names'),
    [
        ({'classes': ['cat', 'dog']}, 2, ['cat', 'dog']),
        ({'class_to_idx': {'dog': 0, 'cat': 1}}, 2, ['dog', 'cat']),
        # As torchvision's ImageNet: several names for one class.
        ({'class_to_idx': {'cat': 0, 'kitten': 0, 'dog': 1}, 'classes': [('cat', 'kitten'), ('dog',)]}, 2, []),
        ({'class_to_idx': {'cat': 0, 'dog': 5}}, 6, []),
        ({}, None, []),
    ],
)
def test_classes_are_counted_by_number_and_named_where_each_has_one_name(told, count, names):
    for dataset in (SimpleNamespace(**told), SimpleNamespace(reader=SimpleNamespace(**told))):
        assert count_classes(dataset) == count
        assert class_names(dataset) == names


def make_images(root, *folders):
    for folder in folders:
        (root / folder).mkdir(parents=True)
        Image.new('RGB', (4, 4)).save(root / folder / 'image.png')


def test_an_image_that_was_read_leaves_no_tar_file_open_for_others_to_read_from(tmp_path):
    write_tar(tmp_path / 'train.tar', 20)
    dataset = open_folder(tmp_path, 'train.tar', need_split=True)
    alone = [dataset[index][0].tobytes() for index in range(len(dataset))]
    # An open file would have one position for all forked workers and threads, and cannot be sent to other workers.
    started_anew = pickle.loads(pickle.dumps(dataset))
    assert [started_anew[index][0].tobytes() for index in range(len(dataset))] == alone
    loader = torch.utils.data.DataLoader(dataset, None, num_workers=2, multiprocessing_context='fork')
    assert [image.tobytes() for image, _ in loader] == alone


def test_hidden_folders_are_no_classes(tmp_path):
    make_images(tmp_path, 'train/cat', 'train/.ipynb_checkpoints', 'train/dog', 'train/dog/.cache')
    dataset = open_folder(tmp_path, 'train', need_split=True)
    assert class_names(dataset) == ['cat', 'dog']
    assert [dataset.reader.samples[index][1] for index in range(len(dataset))] == [0, 1]
    make_images(tmp_path, 'validation/.hidden')
    with pytest.raises(ValueError, match='images in hidden folders only'):
        open_folder(tmp_path, 'validation', need_split=True)


@pytest.mark.parametrize(
    ('train', 'validation', 'message'),
    [
        (['cat', 'dog'], ['dog'], "The validation images lack the class 'cat'"),
        (['dog'], ['cat', 'dog'], "The training images lack the class 'cat'"),
        (list('abcdefgh'), ['a'], "lack the class 'b', 'c', 'd', 'e', 'f' and 2 more"),
    ],
)
def test_the_classes_that_a_split_lacks_are_named(tmp_path, train, validation, message):
    make_images(tmp_path, *[f'train/{name}' for name in train], *[f'validation/{name}' for name in validation])
    splits = [open_folder(tmp_path, split, need_split=True) for split in ('train', 'validation')]
    with pytest.raises(ValueError, match=message):
        check_same_classes(*splits)


def test_class_maps_are_lines_or_a_plain_pickle(tmp_path):
    (tmp_path / 'map.txt').write_text('dog\ncat\n')
    (tmp_path / 'map.pkl').write_bytes(pickle.dumps({'dog': 0, 'cat': 1}))
    for name in ('map.txt', 'map.pkl'):
        assert read_class_map(name, tmp_path) == {'dog': 0, 'cat': 1}
    (tmp_path / 'map.pkl').write_bytes(pickle.dumps(['dog', 'cat']))
    with pytest.raises(ValueError, match=r"a dict from names to numbers, such as {'cat': 0, 'dog': 1}. Write it anew"):
        read_class_map('map.pkl', tmp_path)
    # Its key is a tuple of twice the same tuple, and so on, which takes forever to hash.
    (tmp_path / 'map.pkl').write_bytes(b'}K\x01' + b'q\x00h\x00\x86' * 30 + b'K\x01s.')
    with pytest.raises(ValueError, match=r"'map\.pkl' cannot be read: it takes more than"):
        read_class_map('map.pkl', tmp_path)


@pytest.mark.parametrize('args', [{}, {'mean': (0.2, 0.4, 0.6)}, {'mean': [0.4]}], ids=['model', 'averaged', 'one'])
def test_grey_images_have_one_mean_and_one_deviation(args):
    config = data_config_of({'input_size': (1, 16, 16), **args}, tiny_model(in_chans=1))
    assert config['mean'] == pytest.approx((0.4,) if args else (0.449,), abs=1e-3)
    assert config['std'] == pytest.approx((0.226,), abs=1e-3)
    assert config['input_size'] == (1, 16, 16)


def pipe(path):
    os.mkfifo(path / 'a' / 'pipe.png')


def device(path):
    (path / 'a' / 'device.jpg').symlink_to(os.devnull)


def two_links(path):
    (path / 'a' / 'to_b').symlink_to(path / 'b')
    (path / 'b' / 'to_a').symlink_to(path / 'a')


def split_that_is_a_pipe(path):
    os.mkfifo(path / 'validation')


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (pipe, "a/pipe.png' is a pipe or a device"),
        (device, "a/device.jpg' is a pipe or a device"),
        (two_links, "to_[ab]' is a link to a folder that it is in"),
        (split_that_is_a_pipe, "validation' is a pipe or a device"),
    ],
)
def test_what_would_hang_a_reader_is_named(tmp_path, spoil, message):
    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        Image.new('RGB', (4, 4)).save(tmp_path / name / '1.png')
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_folder(tmp_path, 'validation', need_split=False)
