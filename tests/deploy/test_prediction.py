import csv
import json

import pytest
import timm

from repopt_timm.cli import main
from repopt_timm.deploy import predict
from repopt_timm.deploy.classifier import label_names

from .conftest import CLASSES


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


def test_a_folder_is_a_line_on_the_terminal_and_a_row_of_the_table_for_each_image(named, images, tmp_path, capsys):
    table = tmp_path / 'table.csv'
    assert main(['predict', str(images / 'validation'), '--model', str(named), '--csv', str(table)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = list(csv.DictReader(table.open(newline='')))
    assert len(lines) == len(rows) == 36
    for line, row in zip(lines, rows):
        assert line.startswith(f'{row["image"]}: {row["name_1"]} {100 * float(row["probability_1"]):.2f} %, ')
        assert sum(float(row[f'probability_{place}']) for place in (1, 2, 3)) == pytest.approx(1)


def test_onnx_files_predict_the_same_and_preprocessing_can_differ(checkpoint, onnx_file, images):
    files = [images / 'validation/grey/0.png', images / 'validation/light/1.png']

    def probabilities(source, **overrides):
        rows = predict(source, files, overrides=overrides)
        assert all(best['name'] is None for row in rows for best in row['classes'])
        return [best['probability'] for row in rows for best in row['classes']]

    found = probabilities(checkpoint)
    assert probabilities(onnx_file) == pytest.approx(found, rel=1e-4)
    for overrides in ({'input_size': (3, 64, 64)}, {'mean': [0.9], 'std': [0.1]}):
        assert probabilities(checkpoint, **overrides) != pytest.approx(found, rel=1e-2)


@pytest.mark.parametrize(('tag', 'named'), [('a1_in1k', True), ('cifar10', False), ('mine1k', False)])
def test_imagenets_names_are_for_weights_of_imagenet(tag, named):
    model = timm.create_model('test_resnet')
    model.pretrained_cfg = {**model.pretrained_cfg, 'tag': tag}
    names = label_names(model)
    assert names[281] == 'n02123045' if named else not names


@pytest.mark.parametrize(('image', 'message'), [('none.png', 'no image'), ('', 'no images'), ('broken.png', 'damaged')])
def test_what_is_missing_or_broken_is_named(image, message, checkpoint, tmp_path):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'broken.png').write_bytes(b'no picture')
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        predict(checkpoint, [tmp_path / (image or 'folder')])
