import pickle
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset, create_loader, create_transform

from repopt_timm.datasets import (
    class_names,
    color_mode,
    count_classes,
    data_config_of,
    open_evaluation,
    open_files,
    open_split,
)

from .helpers import tiny_model, write_tar

CONFIG = {'input_size': (3, 24, 24), 'crop_pct': 0.9, 'mean': (0.5,) * 3, 'std': (0.2,) * 3, 'interpolation': 'bicubic'}


def make_images(root, *files):
    """Writes a picture for each name; one without a suffix is a folder with a picture."""
    for file in files:
        path = root / file if '.' in file.rpartition('/')[2][1:] else root / file / 'image.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (4, 4)).save(path)


@pytest.mark.parametrize(
    ('numbers', 'count', 'names'),
    [
        ({'dog': 0, 'cat': 1}, 2, ['dog', 'cat']),
        # As torchvision's ImageNet: several names for one class.
        ({'cat': 0, 'kitten': 0, 'dog': 1}, 2, []),
        ({}, None, []),
    ],
)
def test_classes_are_counted_by_number_and_named_where_each_has_one_name(numbers, count, names):
    told = SimpleNamespace(class_to_idx=numbers)
    for dataset in (told, SimpleNamespace(reader=told)):
        assert (count_classes(dataset), class_names(dataset)) == (count, names)


def test_the_first_folder_of_a_split_is_the_class_whatever_lies_below_it(tmp_path):
    make_images(tmp_path, *(f'train/{name}/{year}' for name in ('cat', 'dog') for year in (2021, 2022)), 'train/ant')
    make_images(tmp_path, 'train/.ipynb_checkpoints', 'train/dog/.cache')
    dataset = open_split(tmp_path, 'train')
    assert class_names(dataset) == ['ant', 'cat', 'dog']
    assert dataset.labels == [0, 1, 1, 2, 2]


def test_names_that_differ_in_case_or_zeros_alone_have_one_order(tmp_path):
    make_images(tmp_path, *(f'train/{name}' for name in ('b', 'a', 'B', 'A', '1²', '10', '1', '01')))
    assert class_names(open_split(tmp_path, 'train')) == ['01', '1', '1²', '10', 'A', 'a', 'B', 'b']


def test_all_that_pillow_reads_is_read_and_what_is_left_out_is_counted(tmp_path, caplog):
    suffixes = ('jpeg', 'png', 'bmp', 'gif', 'webp', 'tiff', 'avif', 'TIF')
    make_images(tmp_path, *(f'train/cat/a.{suffix}' for suffix in suffixes), 'train/beside.png')
    for name in ('1.heic', '2.heic', 'notes.txt', '.hidden.txt'):
        (tmp_path / 'train/cat' / name).touch()
    dataset = open_split(tmp_path, 'train')
    assert len([dataset[index] for index in range(len(dataset))]) == 8
    assert '4 files' in caplog.text and '2 .heic, 1 .png, 1 .txt' in caplog.text


def test_a_class_folder_without_images_is_refused_unless_a_map_numbers_the_classes(tmp_path):
    make_images(tmp_path, 'train/a', 'train/c')
    (tmp_path / 'train/b').mkdir()
    with pytest.raises(ValueError, match=r'train/b'):
        open_split(tmp_path, 'train')
    (tmp_path / 'map.txt').write_text('a\nb\nc\n')
    assert open_split(tmp_path, 'train', class_map='map.txt').labels == [0, 2]


def assert_read_as(root, expected):
    """An image is this one in training, in evaluation and in prediction."""
    for channels, mode in ((1, 'L'), (3, 'RGB')):
        assert open_split(root, 'train', channels)[0][0].tobytes() == expected.convert(mode).tobytes()
    for dataset in (open_evaluation(root, 'train', CONFIG), open_files([root], CONFIG)):
        assert torch.equal(dataset[0][0], create_transform(**CONFIG)(expected.convert('RGB')))


@pytest.mark.parametrize(('suffix', 'dtype'), [('png', np.uint16), ('tiff', np.dtype('>u2'))])
def test_16_bits_are_scaled_to_8(tmp_path, suffix, dtype):
    values = np.arange(4096).reshape(64, 64) * 16
    make_images(tmp_path, f'train/a/deep.{suffix}')
    Image.fromarray(values.astype(dtype)).save(tmp_path / f'train/a/deep.{suffix}')
    assert_read_as(tmp_path, Image.fromarray((values // 256).astype(np.uint8)))
    # Colour jitter takes no other modes.
    dataset = open_split(tmp_path, 'train')
    dataset.transform = create_transform(32, is_training=True, color_jitter=0.4)
    assert dataset[0][0].std() > 0


@pytest.mark.parametrize('dtype', [np.int32, np.float32])
def test_values_of_an_unknown_range_are_refused_by_name_in_training_too(tmp_path, dtype):
    make_images(tmp_path, 'train/a/deep.tiff')
    Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / 'train/a/deep.tiff')
    dataset = open_split(tmp_path, 'train')
    dataset.skip_damaged = True
    with pytest.raises(ValueError, match=r'a/deep\.tiff'):
        dataset[0]


def test_the_orientation_of_a_photograph_is_applied(tmp_path):
    upright = Image.linear_gradient('L').resize((64, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    make_images(tmp_path, 'a/photo.png')
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / 'a/photo.png', exif=exif)
    assert_read_as(tmp_path, upright)


def test_images_are_those_of_timms_evaluation_loader(images):
    dataset = open_evaluation(images, 'validation', CONFIG)
    found = list(dataset.batches(range(len(dataset)), 10, ''))
    theirs = ImageDataset(images / 'validation')
    loader = create_loader(theirs, batch_size=10, device=torch.device('cpu'), num_workers=0, **CONFIG)
    for (batch, labels), (other_batch, other_labels) in zip(found, loader, strict=True):
        torch.testing.assert_close(batch, other_batch, rtol=0, atol=1e-5)
        assert torch.equal(labels, other_labels)


def test_a_seed_draws_a_part_and_the_last_batch_can_be_filled(images):
    dataset = open_evaluation(images, 'train', CONFIG)
    drawn = dataset.sample(20, seed=1)
    assert drawn == dataset.sample(20, seed=1) != dataset.sample(20, seed=2)
    assert sorted(dataset.sample(1000, seed=1)) == list(range(48))
    *_, last = (batch for batch, _ in dataset.batches(drawn, 8, '', whole=True))
    assert torch.equal(last[4:], torch.stack([dataset[index][0] for index in drawn[:4]]))


def test_workers_share_no_position_in_a_tar_file(tmp_path):
    write_tar(tmp_path / 'train.tar', 200)
    dataset = open_split(tmp_path, 'train.tar', need_split=True)
    alone = [dataset[index][0].tobytes() for index in range(len(dataset))]
    assert len(set(alone)) == 200 and class_names(dataset) == ['cat', 'dog']
    # An open file cannot be sent to other workers.
    started_anew = pickle.loads(pickle.dumps(dataset))
    assert [started_anew[index][0].tobytes() for index in range(len(dataset))] == alone
    evaluation = open_evaluation(tmp_path / 'train.tar', 'validation', CONFIG)
    together = torch.cat([batch for batch, _ in evaluation.batches(range(200), 32, '')])
    assert torch.equal(together, torch.stack([evaluation[index][0] for index in range(200)]))


def test_a_tar_file_whose_classes_are_not_its_last_folders_is_refused(tmp_path):
    write_tar(tmp_path / 'train.tar', 4, '{}/2021')
    with pytest.raises(ValueError, match='2021'):
        open_split(tmp_path, 'train.tar')


def test_the_names_of_a_models_classes_number_the_folders(tmp_path, caplog):
    # The same letters in other code points, which sort before and after z.
    composed, apart = (unicodedata.normalize(form, 'café') for form in ('NFC', 'NFD'))
    make_images(tmp_path, 'cafz', apart)
    dataset = open_split(tmp_path, 'validation', class_names=['zebra', composed, 'cafz'])
    assert sorted(dataset.labels) == [1, 2] and class_names(dataset) == ['zebra', composed, 'cafz']
    assert "1 of the model's 3 classes" in caplog.text
    assert sorted(open_split(tmp_path, 'validation', class_names=['cafz', 'other']).labels) == [0, 1]


def test_a_class_map_is_a_name_on_each_line(tmp_path, caplog):
    (tmp_path / 'map.txt').write_text('dog\ncat\n\n')
    # A folder without splits is taken whole.
    make_images(tmp_path, 'cat', 'dog', 'fox')
    dataset = open_split(tmp_path, 'train', class_map='map.txt')
    assert (dataset.class_to_idx, dataset.labels) == ({'dog': 0, 'cat': 1}, [1, 0])
    assert '1 images of classes that the class map lacks' in caplog.text
    # A Mac writes other code points into the folder than an editor into the map.
    composed, apart = (unicodedata.normalize(form, 'café') for form in ('NFC', 'NFD'))
    (tmp_path / 'map.txt').write_text(f'{composed}\n')
    make_images(tmp_path / 'mac', apart)
    assert open_split(tmp_path / 'mac', 'train', class_map=str(tmp_path / 'map.txt')).labels == [0]


@pytest.mark.parametrize(
    ('folders', 'words'),
    [
        ([], 'There is no image folder'),
        (['val/cat', 'test/cat'], "the split 'train', but with val, test"),
        (['val/.hidden', 'train/.hidden'], "no images for the split 'train'"),
        (['cat', 'dog'], "the split 'train'"),
    ],
)
def test_what_is_missing_is_named(tmp_path, folders, words):
    make_images(tmp_path / 'data', *folders)
    with pytest.raises((FileNotFoundError, ValueError), match=words):
        open_split(tmp_path / 'data', 'train', need_split=True)


def test_a_damaged_image_is_named_and_skipped_in_training_alone(tmp_path, caplog):
    make_images(tmp_path, 'dark/b.png')
    whole = (tmp_path / 'dark/b.png').read_bytes()
    for broken in (whole[: len(whole) // 2], b'no image', whole[:40]):
        (tmp_path / 'dark/a.png').write_bytes(broken)
        dataset = open_split(tmp_path, 'train')
        with pytest.raises(ValueError, match=r'dark/a\.png'):
            dataset[0]
        dataset.skip_damaged = True
        assert dataset[0][0].tobytes() == dataset[1][0].tobytes()
        assert 'dark/a.png' in caplog.text
    (tmp_path / 'dark/b.png').write_bytes(b'')
    with pytest.raises(ValueError, match=r'2 images in a row'):
        dataset[0]


@pytest.mark.parametrize(('channels', 'stated'), [(5, None), (3, 'L')])
def test_other_images_than_grey_and_colour_ones_are_refused(channels, stated):
    with pytest.raises(ValueError, match=r'L.*RGB.*RGBA'):
        color_mode(channels, stated)


@pytest.mark.parametrize('args', [{}, {'mean': (0.2, 0.4, 0.6)}, {'mean': [0.4]}], ids=['model', 'averaged', 'one'])
def test_grey_images_have_one_mean_and_one_deviation(args):
    for size, given in ((16, {'input_size': (1, 16, 16)}), (224, {'in_chans': 1})):
        config = data_config_of({**given, **args}, tiny_model(in_chans=1))
        assert config['mean'] == pytest.approx((0.4,) if args else (0.449,), abs=1e-3)
        assert config['std'] == pytest.approx((0.226,), abs=1e-3)
        assert config['input_size'] == (1, size, size)
