from argparse import Namespace
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from repopt_timm.deploy.image_folder import ImageFolder

from repopt_timm import save_pretrained
from repopt_timm.deploy import Classifier, QuantizationOptions, evaluate, export_onnx, quantize_onnx, save_onnx
from repopt_timm.deploy.classifier import data_config, load_classifier, onnx_classifier
from repopt_timm.deploy.evaluation import accuracies, alternate, check_classes, is_steady
from repopt_timm.deploy.runtime import load_onnx

from .conftest import ARGS

CONFIG = {'input_size': (3, 32, 32)}


def test_pytorch_and_onnx_are_equally_accurate_and_int8_nearly(checkpoint, onnx_file, quantization, images, tmp_path):
    save_onnx(quantization().quantized, tmp_path / 'int8.onnx')
    found = [evaluate(source, images, batch_size=9) for source in (checkpoint, onnx_file, tmp_path / 'int8.onnx')]
    assert [row['backend'] for row in found] == ['pytorch', 'onnxruntime', 'onnxruntime']
    assert found[0]['top1'] == found[1]['top1'] > 80
    assert abs(found[2]['top1'] - found[0]['top1']) < 10
    for row in found:
        assert row['images'] == 36
        assert row['top5'] == 100
        assert 0 < row['latency_ms'] <= row['latency_p90_ms']
        assert row['throughput'] > 0
    assert found[1]['bytes'] == onnx_file.stat().st_size
    assert found[2]['bytes'] < 0.3 * found[0]['bytes']


def classifier(scores, num_classes=3):
    """Gives all images the same logits."""
    return Classifier('stub', lambda images: torch.tensor([scores] * len(images)), CONFIG, 0)


def test_accuracy_counts_images(images):
    folder = ImageFolder(images, 'validation', CONFIG)
    found = accuracies({'first': classifier([3.0, 2.0, 1.0]), 'last': classifier([1.0, 2.0, 3.0])}, folder, 7)
    assert found == {'first': (100 / 3, 100), 'last': (100 / 3, 100)}
    # Twelve classes, of which the folder has the first three.
    folder.num_classes = 12
    low = classifier([-1.0, *range(11)])
    assert accuracies({'low': low}, folder, 7) == {'low': (0, 0)}


def test_classes_in_another_order_than_the_models_are_an_error(checkpoint, images, tmp_path):
    map_file = tmp_path / 'map.txt'
    map_file.write_text('light\ngrey\ndark\n')
    names = {'label_names': ['light', 'grey', 'dark']}
    other = tmp_path / 'other.pth.tar'
    torch.save({**torch.load(checkpoint, weights_only=False), **names}, other)
    export_onnx(other, tmp_path / 'other.onnx')
    for source in (other, tmp_path / 'other.onnx'):
        with pytest.raises(ValueError, match=r"Class 0 of the model is 'light'.*is 'dark'. Give the --class-map"):
            evaluate(source, images)
        assert evaluate(source, images, class_map=str(map_file))['top1'] < 40


@pytest.mark.parametrize(
    ('trained', 'folders', 'message'),
    [
        # In the order of code points an e with an accent of its own stands before z, and an é after it.
        (['cafe\u0301', 'cafz'], ['cafz', 'caf\u00e9'], "Class 0 of the model is 'caf\u00e9', but .* is 'cafz'"),
        (
            ['cat', 'dog', 'fox'],
            ['ant', 'cat', 'dog'],
            "Class 0 of the model is 'cat', but .* is 'ant'. Give the --class",
        ),
        (['n01', 'n02'], ['cat', 'dog'], None),
        (['cat', 'n02'], ['cat', 'dog'], None),
        (['cafe\u0301', 'dog'], ['caf\u00e9', 'dog'], None),
    ],
    ids=['accents', 'overlap', 'other names', 'one other name', 'the same letters'],
)
def test_a_name_that_model_and_folder_share_has_one_number(trained, folders, message):
    config = {'input_size': (3, 8, 8)}
    model = Classifier('stub', lambda images: torch.zeros(len(images), len(trained)), config, 0, trained)
    folder = SimpleNamespace(class_names=folders, num_classes=len(folders), folder='images')
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        check_classes(model, folder)


def test_a_class_map_orders_the_classes(checkpoint, images, tmp_path):
    (tmp_path / 'map.txt').write_text('light\ngrey\ndark\n')
    in_order, reversed_order = (
        evaluate(checkpoint, images, class_map=name) for name in ('', str(tmp_path / 'map.txt'))
    )
    assert reversed_order['top1'] < 40 < in_order['top1']
    with pytest.raises(FileNotFoundError, match='There is no class map'):
        evaluate(checkpoint, images, class_map='nowhere.txt')


def test_images_are_read_in_the_mode_that_the_model_was_trained_on(checkpoint, images, tmp_path):
    content = torch.load(checkpoint, weights_only=False)
    hsv = tmp_path / 'hsv.pth.tar'
    torch.save({**content, 'args': Namespace(**vars(ARGS), input_img_mode='HSV')}, hsv)
    save_pretrained(hsv, tmp_path / 'folder')
    export_onnx(hsv, tmp_path / 'hsv.onnx')
    quantized = quantize_onnx(tmp_path / 'hsv.onnx', images, QuantizationOptions(images=4))
    save_onnx(quantized.quantized, tmp_path / 'int8.onnx')
    expected = ImageFolder(images, 'validation', {**load_classifier(checkpoint).config, 'input_img_mode': 'HSV'})[0][0]
    for source in (hsv, tmp_path / 'folder', tmp_path / 'hsv.onnx', tmp_path / 'int8.onnx'):
        found = ImageFolder(images, 'validation', load_classifier(source).config)[0][0]
        assert torch.equal(found, expected), source
    assert torch.equal(quantized.images[0][0], ImageFolder(images, 'train', load_classifier(hsv).config)[0][0])
    # The card's example reads them so too.
    assert "Image.open('image.jpg').convert('HSV')" in (tmp_path / 'folder/README.md').read_text()
    other = evaluate(hsv, images, overrides={'input_img_mode': 'RGB'})['top1']
    assert evaluate(hsv, images)['top1'] < other == evaluate(checkpoint, images)['top1']


def test_another_number_of_classes_is_an_error(images):
    folder = ImageFolder(images, 'validation', CONFIG)
    with pytest.raises(ValueError, match=r"The model has 4 classes, but the folder '.*validation' has 3"):
        accuracies({'': classifier([0.0] * 4)}, folder)


def test_models_are_timed_in_turn():
    calls = []
    times = alternate({'a': lambda: calls.append('a'), 'b': lambda: calls.append('b')}, rounds=5, seconds=0)
    assert {name: [len(turn) for turn in turns] for name, turns in times.items()} == {'a': [3] * 5, 'b': [3] * 5}
    turns = [name for name, before in zip(calls, ['', *calls]) if name != before]
    # The order rotates, so that a turn at the end of a round and one at the start of the next look like one.
    assert turns == ['a', 'b'] * 4


def test_times_with_a_long_tail_are_not_steady():
    assert is_steady([1.0] * 19 + [9.0])
    assert not is_steady([1.0] * 17 + [9.0] * 3)


def test_images_of_other_channels_than_the_model_takes_are_an_error(checkpoint, images):
    with pytest.raises(
        ValueError, match=r'The model cannot run on \(1, 1, 32, 32\) images: .*input size that it takes'
    ):
        evaluate(checkpoint, images, overrides={'input_size': (1, 32, 32)})


def test_logits_that_are_not_numbers_are_no_accuracy(images):
    folder = ImageFolder(images, 'validation', CONFIG)
    with pytest.raises(ValueError, match='logits that are not finite'):
        accuracies({'broken': classifier([float('nan'), 0.0, 0.0])}, folder)


@pytest.mark.parametrize(
    ('metadata', 'message'),
    [
        ({'mean': '"abc"'}, 'cannot be read'),
        ({'mean': '[NaN, 0, 0]'}, 'with mean'),
        ({'std': '[0, 1, 1]'}, 'with std'),
        ({'interpolation': '5'}, 'cannot be read'),
        ({'crop_pct': '"x"'}, 'cannot be read'),
        ({'crop_pct': '1e-9'}, 'with crop_pct'),
        ({'crop_mode': '"x"'}, 'with crop_mode'),
    ],
    ids=str,
)
def test_preprocessing_that_an_onnx_file_states_is_checked(onnx_file, metadata, message):
    with pytest.raises(ValueError, match=message):
        data_config(stating(onnx_file, metadata))


def test_metadata_of_an_onnx_file_that_say_nothing_are_ignored(onnx_file, tmp_path):
    for metadata in ({'label_names': '5'}, {'label_names': '[1, 2]'}, {'other': '[' * 100_000}):
        assert onnx_classifier(stating(onnx_file, metadata)).class_names == ()


def test_a_file_for_a_later_runtime_is_named(onnx_file, tmp_path):
    model = load_onnx(onnx_file)
    model.opset_import[0].version = 99
    save_onnx(model, tmp_path / 'later.onnx')
    with pytest.raises(ValueError, match=r"cannot run '.*later\.onnx'"):
        load_classifier(tmp_path / 'later.onnx')


def stating(path, metadata):
    """An exported model with other metadata."""
    model = load_onnx(path)
    kept = [entry for entry in model.metadata_props if entry.key not in metadata and entry.key != 'label_names']
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    return model
