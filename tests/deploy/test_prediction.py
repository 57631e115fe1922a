import csv
import json

import pytest
import timm
import torch

from repopt_timm.cli import main
from repopt_timm.deploy import predict
from repopt_timm.deploy.classifier import label_names

from .conftest import CLASSES


def test_the_best_classes_of_each_image_come_first_under_their_names(named, images, tmp_path, capsys):
    files = [str(images / 'validation' / label / '0.png') for label in CLASSES]
    words = ['predict', *files, '--model', str(named), '--top', '2']
    assert main([*words, '--json']) == 0
    found = json.loads(capsys.readouterr().out)['images']
    assert [row['image'] for row in found] == files
    assert [row['classes'][0]['class'] for row in found] == [0, 1, 2]
    # WordNet's numbers in words.
    assert [row['classes'][0]['name'] for row in found] == ['dark', 'tabby, tabby cat', 'light']
    assert all(1 >= first['probability'] > second['probability'] for first, second in (r['classes'] for r in found))
    assert main([*words, '--csv', str(tmp_path / 'table.csv')]) == 0
    rows = list(csv.DictReader((tmp_path / 'table.csv').open(newline='')))
    for line, row in zip(capsys.readouterr().out.splitlines(), rows, strict=True):
        assert line.startswith(f'{row["image"]}: {row["name_1"]} {100 * float(row["probability_1"]):.2f} %, ')


def test_a_class_that_looks_like_wordnets_and_is_not_keeps_its_name(named, images, tmp_path):
    content = torch.load(named, weights_only=False)
    torch.save({**content, 'label_names': ['dark', 'grey', 'n12345678']}, tmp_path / 'mine.pth.tar')
    [row] = predict(tmp_path / 'mine.pth.tar', [images / 'validation/light/0.png'])
    assert row['classes'][0]['name'] == 'n12345678'
    with pytest.raises(ValueError, match='no images'):
        predict(named, [])


def test_onnx_files_predict_the_same_and_preprocessing_can_differ(checkpoint, onnx_file, images):
    def probabilities(source, **overrides):
        rows = predict(source, [images / 'validation' / 'grey'], top=3, overrides=overrides)
        assert len(rows) == 12 and all(best['name'] is None for row in rows for best in row['classes'])
        return [best['probability'] for row in rows for best in row['classes']]

    found = probabilities(checkpoint)
    assert sum(found) == pytest.approx(12)
    assert probabilities(onnx_file) == pytest.approx(found, rel=1e-3)
    for overrides in ({'input_size': (3, 64, 64)}, {'mean': [0.9], 'std': [0.1]}):
        assert probabilities(checkpoint, **overrides) != pytest.approx(found, rel=1e-2)


@pytest.mark.parametrize(('tag', 'named'), [('a1_in1k', True), ('cifar10', False), ('mine1k', False)])
def test_imagenets_names_are_for_weights_of_imagenet(tag, named):
    model = timm.create_model('test_resnet')
    model.pretrained_cfg = {**model.pretrained_cfg, 'tag': tag}
    names = label_names(model)
    assert names[281] == 'n02123045' if named else not names
