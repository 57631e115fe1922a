from contextlib import nullcontext

import pytest
import torch
from PIL import Image

from repopt_timm.cli import main
from repopt_timm.datasets import Images, core_count, open_evaluation
from repopt_timm.deploy import evaluate
from repopt_timm.deploy.classifier import Classifier, load_classifier
from repopt_timm.deploy.evaluation import check_classes, class_table, classify, worst_classes, write_confusion

CONFIG = {'input_size': (3, 32, 32)}


def test_pytorch_and_onnx_are_equally_accurate(checkpoint, onnx_file, images):
    found = [evaluate(source, images, batch_size=9) for source in (checkpoint, onnx_file)]
    assert [row['backend'] for row in found] == ['pytorch', 'onnxruntime']
    assert found[0]['top1'] == found[1]['top1'] > 80 and found[0]['classes'] == found[1]['classes']
    for row in found:
        assert (row['images'], row['top5'], row['batch_size']) == (36, 100, 9)
        assert 0 < row['latency_ms'] <= row['latency_p90_ms'] and row['throughput'] > 0
    assert found[1]['bytes'] == onnx_file.stat().st_size


def classifier(scores, names=()):
    """Gives all images the same logits."""
    return Classifier('stub', lambda images: torch.tensor([[*scores]] * len(images)), CONFIG, 0, names)


@pytest.mark.parametrize(
    ('scores', 'top1', 'top5', 'ties'),
    [
        ([0] * 9 + [1, 2, 3], 100 / 3, 100, 0),
        ([0] * 9 + [3, 3, 1], 100 / 3, 100, 36),
        # Tied for the fifth place.
        ([5, 4, 3, 2] + [0] * 5 + [1] * 3, 0, 100 / 3, 0),
    ],
)
def test_top_1_is_argmax_and_ties_are_counted(scores, top1, top5, ties, images):
    folder = open_evaluation(images, 'validation', CONFIG, class_names=[*'abcdefghi', 'dark', 'grey', 'light'])
    found = classify({'one': classifier(scores)}, folder, 7)['one']
    assert (found.accuracy(), found.accuracy(5), found.ties) == (pytest.approx(top1), pytest.approx(top5), ties)
    assert found.ranked[:, 0].eq(torch.tensor(scores).argmax()).all()


def test_a_table_and_a_matrix_say_which_classes_are_confused(tmp_path):
    # The model has a fifth class, which the folder lacks.
    labels, predictions = torch.tensor([0, 0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 1, 1, 1, 0, 4])
    names = ['cat', 'dog', 'fox, red', 'owl']
    table = class_table(labels, predictions, names)
    assert [row['images'] for row in table] == [3, 2, 2, 0]
    assert [row['accuracy'] for row in table] == [pytest.approx(100 / 3), 100, 0, None]
    rows = [line.split()[1] for line in worst_classes(table, 3).splitlines()]
    assert rows[2:] == ['fox,', 'cat', 'dog']
    assert [(row['confused_with'], row['confused']) for row in table] == [('dog', 2), ('', 0), ('cat', 1), ('', 0)]
    write_confusion(labels, predictions, names, tmp_path)
    lines = (tmp_path / 'confusion.csv').read_text().splitlines()
    assert lines == [',cat,dog,"fox, red",owl', 'cat,1,2,0,0', 'dog,0,2,0,0', '"fox, red",1,0,0,0', 'owl,0,0,0,0']
    assert (tmp_path / 'classes.csv').read_text().splitlines()[2] == 'dog,2,100.0,,0'
    assert Image.open(tmp_path / 'confusion.png').width > 300


def test_the_folder_of_a_run_is_evaluated_at_its_best_and_ties_are_printed(checkpoint, images, tmp_path, capsys):
    (tmp_path / 'last.pth.tar').symlink_to(checkpoint)
    words = ['evaluate', str(tmp_path), '--data', str(images)]
    assert main([*words, '--out', str(tmp_path / 'out')]) == 0
    assert 'ties        0 images' in capsys.readouterr().out
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {'classes.csv', 'confusion.csv', 'confusion.png'}
    state = torch.load(checkpoint, weights_only=False)
    for name in ('head.fc.weight', 'head.fc.bias'):
        state['state_dict'][name].zero_()
    torch.save(state, tmp_path / 'model_best.pth.tar')
    assert main(words) == 0
    told = capsys.readouterr().out
    assert 'ties        36 images' in told and 'top-1       33.33 %' in told


def test_the_class_names_of_a_model_decide_and_a_class_map_where_it_has_none(checkpoint, images, tmp_path):
    (tmp_path / 'map.txt').write_text('light\ngrey\ndark\n')
    named = tmp_path / 'named.pth.tar'
    torch.save({**torch.load(checkpoint, weights_only=False), 'label_names': ['light', 'grey', 'dark']}, named)
    as_map = evaluate(checkpoint, images, class_map=str(tmp_path / 'map.txt'))['top1']
    assert evaluate(named, images)['top1'] == as_map < 40 < evaluate(checkpoint, images)['top1']


def test_logits_that_are_not_numbers_are_no_accuracy(images):
    folder = open_evaluation(images, 'validation', CONFIG)
    with pytest.raises(ValueError, match='logits that are not finite'):
        classify({'broken': classifier([float('nan'), 0.0, 0.0])}, folder)


def test_threads_are_bounded_by_the_cores(checkpoint, onnx_file):
    before = torch.get_num_threads()
    for source in (checkpoint, onnx_file):
        model = load_classifier(source, threads=1_000_000)
        assert model.run(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert torch.get_num_threads() == core_count()
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ('trained', 'folders', 'message'),
    [
        (['cat', 'dog', 'fox'], ['ant', 'cat', 'dog'], r"Class 0 of the model is 'cat'.* --class-map"),
        (['n01', 'n02'], ['cat', 'dog'], ''),
        (['cat', 'n02'], ['cat', 'dog'], ''),
        (['cat', 'dog', 'fox'], ['ant', 'bee'], 'The model has 3 classes, but'),
    ],
)
def test_a_name_that_model_and_folder_share_has_one_number(trained, folders, message):
    folder = Images([], 3, class_to_idx={name: number for number, name in enumerate(folders)})
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        check_classes(classifier([0.0] * len(trained), trained), folder)
