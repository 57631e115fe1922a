import pickle

import pytest
import torch
from PIL import ImageMode
from timm.data import create_dataset, create_loader

from repopt_timm.deploy.image_folder import ImageFolder

from ..helpers import write_tar
from .conftest import ARGS

CONFIG = {'input_size': (3, 24, 24), 'crop_pct': 0.9, 'mean': ARGS.mean, 'std': ARGS.std, 'interpolation': 'bicubic'}


def test_images_are_those_of_timms_evaluation_loader(images):
    folder = ImageFolder(images, 'validation', CONFIG)
    found = list(folder.batches(range(len(folder)), 10, ''))
    loader = create_loader(
        create_dataset('', root=images, split='validation'),
        batch_size=10,
        device=torch.device('cpu'),
        num_workers=0,
        persistent_workers=False,
        **CONFIG,
    )
    expected = list(loader)
    assert len(found) == len(expected) == 4
    for (batch, targets), (other_batch, other_targets) in zip(found, expected):
        torch.testing.assert_close(batch, other_batch, rtol=0, atol=1e-5)
        assert torch.equal(targets, other_targets)


@pytest.mark.parametrize('mode', ['L', 'LA', 'RGBA', 'CMYK', 'YCbCr', 'LAB', 'HSV'])
def test_so_they_are_in_other_modes(images, mode):
    channels = len(ImageMode.getmode(mode).bands)
    config = {**CONFIG, 'input_size': (channels, 24, 24), 'mean': [0.5] * channels, 'std': [0.2] * channels}
    (batch, _), *_ = ImageFolder(images, 'validation', {**config, 'input_img_mode': mode}).batches(range(10), 10, '')
    loader = create_loader(
        create_dataset('', root=images, split='validation', input_img_mode=mode),
        batch_size=10,
        device=torch.device('cpu'),
        num_workers=0,
        persistent_workers=False,
        **config,
    )
    torch.testing.assert_close(batch, next(iter(loader))[0], rtol=0, atol=1e-5)


def test_a_seed_draws_a_subset_of_all_classes(images):
    folder = ImageFolder(images, 'train', CONFIG)
    assert folder.sample(20, seed=1) == folder.sample(20, seed=1) != folder.sample(20, seed=2)
    assert len(set(folder.sample(20, seed=1))) == 20
    assert sorted(folder.sample(1000, seed=1)) == list(range(60))
    (_, targets), *_ = folder.batches(folder.sample(20, seed=1), 20, '')
    assert targets.unique().tolist() == [0, 1, 2]


def test_an_image_that_does_not_decode_is_named_and_not_skipped(images, tmp_path):
    folder = tmp_path / 'validation' / 'dark'
    folder.mkdir(parents=True)
    whole = (images / 'validation' / 'dark' / '0.png').read_bytes()
    (folder / 'a.png').write_bytes(whole)
    for broken in (whole[: len(whole) // 2], b'', b'no image', whole[:40]):
        (folder / 'b.png').write_bytes(broken)
        with pytest.raises(ValueError, match=r"The image '.*b\.png' cannot be read"):
            list(ImageFolder(tmp_path, 'validation', CONFIG).batches(range(2), 1, ''))


def test_threads_share_no_position_in_a_tar_file(tmp_path):
    write_tar(tmp_path / 'images.tar', 200)
    folder = ImageFolder(tmp_path / 'images.tar', 'validation', CONFIG)
    alone = torch.stack([folder[index][0] for index in range(len(folder))])
    pickle.dumps(folder)  # fails with a file that is left open
    assert torch.equal(torch.cat([batch for batch, _ in folder.batches(range(200), 32, '')]), alone)


def test_missing_and_empty_folders_are_told(images, tmp_path):
    with pytest.raises(FileNotFoundError, match='expected one with images in train/<class>/'):
        ImageFolder(tmp_path / 'nowhere', 'train', CONFIG)
    with pytest.raises(ValueError, match="There are no images for the split 'train'"):
        ImageFolder(tmp_path, 'train', CONFIG)


def test_another_split_is_not_taken_for_the_one_asked_for(images, tmp_path):
    (tmp_path / 'val').symlink_to(images / 'validation')
    assert len(ImageFolder(tmp_path, 'validation', CONFIG)) == 36
    with pytest.raises(ValueError, match="has no split 'train', but val"):
        ImageFolder(tmp_path, 'train', CONFIG)


def test_a_folder_without_splits_is_taken_whole(images):
    assert len(ImageFolder(images / 'train', 'validation', CONFIG)) == 60


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_images_have_the_channels_of_the_model(images, channels):
    config = {**CONFIG, 'input_size': (channels, 24, 24), 'mean': [0.5] * channels, 'std': [0.2] * channels}
    assert ImageFolder(images, 'train', config)[0][0].shape == (channels, 24, 24)


def test_channels_that_images_cannot_have_are_refused(images):
    with pytest.raises(ValueError, match='The model takes 5 channels, expected 1 to 4'):
        ImageFolder(images, 'train', {**CONFIG, 'input_size': (5, 24, 24)})
