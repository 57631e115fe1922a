import json
from argparse import Namespace

import pytest
import timm
import torch

from repopt_timm.cli import main
from repopt_timm.deploy import load_model, predict
from repopt_timm.deploy.prediction import _imagenet_names

from ..helpers import TINY
from .conftest import ARGS, CLASSES, write_checkpoint


@pytest.fixture(scope='module')
def named(checkpoint, tmp_path_factory):
    """The trained checkpoint, as a run on a folder of images writes it: with the names of the classes."""
    model = load_model(checkpoint)
    content = torch.load(checkpoint, weights_only=False)
    assert model.num_classes == len(CLASSES)
    path = tmp_path_factory.mktemp('named') / 'last.pth.tar'
    torch.save({**content, 'label_names': ['dark', 'n02123045', 'light']}, path)
    return path


def test_the_best_classes_come_first_under_their_names(named, images, capsys):
    files = [str(images / 'validation' / label / '0.png') for label in CLASSES]
    assert main(['predict', *files, '--model', str(named), '--top', '2', '--json']) == 0
    found = json.loads(capsys.readouterr().out)['images']
    assert [row['image'] for row in found] == files
    assert [row['classes'][0]['class'] for row in found] == [0, 1, 2]
    # WordNet's numbers in words.
    assert [row['classes'][0]['name'] for row in found] == ['dark', 'tabby, tabby cat', 'light']
    for row in found:
        first, second = (each['probability'] for each in row['classes'])
        assert 1 >= first > second >= 0
    assert main(['predict', files[0], '--model', str(named)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == files[0]
    assert lines[1].endswith(' %  dark')
    assert len(lines) == 4


def test_onnx_files_predict_the_same(checkpoint, onnx_file, images):
    files = [images / 'validation/grey/0.png', images / 'validation/light/1.png']
    for first, second in zip(predict(checkpoint, files), predict(onnx_file, files)):
        assert [row['class'] for row in first] == [row['class'] for row in second]
        assert [row['name'] for row in first] == [None] * 3
        torch.testing.assert_close(*([row['probability'] for row in rows] for rows in (first, second)))


def test_images_are_read_with_the_channels_of_the_model(images, tmp_path):
    args = Namespace(**{**vars(ARGS), 'input_size': [4, 32, 32], 'mean': [0.5] * 4, 'std': [0.2] * 4})
    path = write_checkpoint(timm.create_model(TINY, num_classes=3, in_chans=4), tmp_path / 'rgba.pth.tar', args=args)
    assert len(predict(path, [images / 'validation/grey/0.png'])[0]) == 3


@pytest.mark.parametrize(('tag', 'named'), [('a1_in1k', True), ('in1k', True), ('cifar10', False), ('mine1k', False)])
def test_imagenets_names_are_for_weights_of_imagenet(tag, named):
    model = timm.create_model('test_resnet')
    model.pretrained_cfg = {**model.pretrained_cfg, 'tag': tag}
    names = _imagenet_names(model)
    assert names[281] == 'tabby, tabby cat' if named else not names


@pytest.mark.parametrize(
    ('image', 'model', 'message'),
    [
        ('none.png', '{checkpoint}', r"There is no image '.*none\.png', expected a file such as photo\.jpg"),
        ('', '{checkpoint}', 'is a folder, expected image files'),
        ('broken.png', '{checkpoint}', r"The image '.*broken\.png' cannot be read"),
        ('broken.png', 'resnet-18', r'resnet-18'),
        ('broken.png', 'none.pth', r"There is no checkpoint 'none\.pth'"),
    ],
)
def test_what_is_missing_or_broken_is_named(image, model, message, checkpoint, tmp_path):
    (tmp_path / 'broken.png').write_bytes(b'no picture')
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        predict(model.format(checkpoint=checkpoint), [tmp_path / image])
