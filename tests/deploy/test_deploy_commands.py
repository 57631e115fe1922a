import json
import sys

import numpy as np
import onnx
import pytest
import torch
from huggingface_hub import ModelCard

from repopt_timm.cli import main
from repopt_timm.deploy import evaluate, save_onnx
from repopt_timm.deploy.onnx_graph import Graph

from ..helpers import assert_refused, tiny_model
from .conftest import write_checkpoint


def test_quantize_writes_an_int8_file_and_what_its_layers_cost(checkpoint, images, tmp_path, capsys):
    arguments = f'quantize {checkpoint} --data {images} --out {tmp_path}/int8.onnx --images 12'
    assert main(f'{arguments} --weights per-tensor --sensitivity {tmp_path}/layers'.split()) == 0
    out = capsys.readouterr().out
    assert 'calibrated on 12 images' in out and 'of 12 other images are' in out and '| all ' in out
    assert {path.name for path in tmp_path.glob('*/*')} == {'sensitivity.json', 'sensitivity.md'}
    assert main(['evaluate', f'{tmp_path}/int8.onnx', '--data', str(images), '--json']) == 0
    assert json.loads(capsys.readouterr().out)['top1'] > 80


def test_what_breaks_int8_is_a_warning_and_equalizing_mends_it(damaged, images, tmp_path, capsys, caplog):
    common = f'quantize {damaged} --data {images} --out {tmp_path}/out.onnx --weights per-tensor --json'
    assert main(common.split()) == 0
    broken = json.loads(capsys.readouterr().out)
    assert broken['agreement'] < 70 and broken['outliers'] == {'stages.1.1.conv': 1}
    assert broken['dead_channels']['stages.1.1.conv'] >= 1
    steps = ('--calibration auto', '--equalize', 'per-channel', '--sensitivity', 'stages.1.1.conv 1')
    assert all(step in caplog.text for step in steps)
    caplog.clear()
    # On a processor without VNNI a warning would ask for 7 bits.
    assert main([*common.split(), '--equalize', '--reduce-range']) == 0
    mended = json.loads(capsys.readouterr().out)
    assert mended['agreement'] > 90
    assert mended['equalization']['removed']['stages.1.1.conv'] >= 1
    assert not mended['outliers'] and not mended['dead_channels'] and not caplog.text


def test_a_saved_card_has_the_accuracy_of_the_weights_beside_it(checkpoint, images, tmp_path, capsys, caplog):
    folder = tmp_path / 'saved'
    assert main(['save', str(checkpoint), str(folder), '--precision', 'int8', '--data', str(images), '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    assert caplog.text.count('licence') == 1
    results = ModelCard.load(folder / 'README.md').data.eval_results
    assert [result.metric_value for result in results] == [found['top1'], found['top5']]
    assert found['top1'] == round(evaluate(folder, images)['top1'], 3)


def test_export_warns_of_outliers_and_still_channels_and_takes_the_form_of_the_file(
    checkpoint, images, tmp_path, capsys, caplog
):
    state = torch.load(checkpoint, weights_only=False)
    state['state_dict']['stages.1.1.conv.weight'][0, 0, 0, 0] = 1e4
    state['state_dict']['stages.2.0.bn.running_var'][:3] = 0
    torch.save(state, tmp_path / 'last.pth.tar')
    fixed = str(tmp_path / 'fixed.onnx')
    arguments = ['--onnx', fixed, '--fixed-batch', '8', '--opset', '20', '--json']
    assert main(['export', str(tmp_path / 'last.pth.tar'), *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found['opset'], found['outliers']) == (20, {'stages.1.1.conv': 1})
    assert found['still_channels'] == {'stages.2.0.bn': 3}
    assert 'stages.1.1.conv 1' in caplog.text and 'stages.2.0.bn 3' in caplog.text
    assert main(['evaluate', fixed, '--data', str(images), '--batch-size', '20']) == 0
    out = capsys.readouterr().out
    assert 'ms p90 at batch 8\n' in out and 'images/s at batch 24\n' in out
    compare = f'compare-int8 A={fixed} --data {images} --calibrations minmax --latency-batches 1 9'
    assert main([*compare.split(), '--out', str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert '| A | per-tensor |' in table and table == (tmp_path / 'int8.md').read_text()
    assert [row['batch'] for row in json.loads((tmp_path / 'int8.json').read_text())['latency']] == [8, 16]


@pytest.mark.parametrize(
    ('command', 'message'),
    [
        ('export nowhere/last.pth.tar --onnx {tmp}/new.onnx', 'nowhere/last.pth.tar'),
        ('export no_such_model --onnx {tmp}/new.onnx', 'no_such_model'),
        ('export test_repopt_vgg --onnx {tmp}/new.onnx', 'There are no trained weights'),
        ('export {tmp}/broken --onnx {tmp}/new.onnx', 'cannot be made'),
        ('export {five} --onnx {five}/new.onnx', 'cannot be written'),
        ('export {five} --onnx {tmp}/new.txt', '.onnx'),
        ('export {five} --onnx {tmp}/new.onnx --opset 40', 'no opset 40'),
        ('export {model} --onnx {tmp}/new.onnx', 'is an ONNX file'),
        ('export output/nowhere --onnx {tmp}/new.onnx', "'output/nowhere' is not a file"),
        ('predict {tmp}/empty --model {model}', 'There are no images'),
        ('predict {tmp}/none.png --model {model}', 'none.png'),
        ('quantize {model} --data {tmp}/broken {out}', "broken/train/a/1.png' is damaged"),
        ('quantize {model} --data {images} {out} --exclude conv9', "'conv9': no layer"),
        ('quantize {model} --data {images} --out {model}', 'is the input itself'),
        ('quantize {model} --data {images} {out} --images 60 --calibration auto', 'has 60 images'),
        ('quantize {model} --data {images} {out} --class-map nowhere.txt', 'nowhere.txt'),
        ('quantize {tmp}/nan.onnx --data {images} {out}', "'head.fc.bias'"),
        ('quantize {tmp}/half.onnx --data {images} {out}', 'float16'),
        ('quantize {tmp}/int8.onnx --data {images} {out}', 'quantized already'),
        ('evaluate {tmp}/future.onnx --data {images}', 'cannot run the model'),
        ('evaluate {tmp}/text.onnx --data {images}', 'is not a readable ONNX model'),
        ('evaluate {five} --data {images}', 'The model has 5 classes, but the folder'),
        ('evaluate {model} --data {images} --mean 0.5 0.5', 'Images cannot be prepared with'),
        ('evaluate {model} --data {images} --crop-pct 3', 'crop_pct'),
        ('evaluate {model} --data {images} --input-size 1 32 32', 'does not run on images'),
        ('compare-int8 {model} --data {images} --out {five}', 'is not a folder'),
        ('compare-int8 {model} {model} --data {images}', 'same label'),
        ('compare-int8 {model} --data {images}/train', "split 'validation'"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_no_file(
    command, message, exported, onnx_file, quantization, images, tmp_path, capsys
):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'broken' / 'train' / 'a').mkdir(parents=True)
    (tmp_path / 'broken' / 'train' / 'a' / '1.png').write_bytes(b'no image')
    (tmp_path / 'broken' / 'config.json').write_text('{}')
    (tmp_path / 'text.onnx').write_text('no model')
    graph = Graph(exported)
    graph.biases['head.fc'][0] = np.nan
    files = {'future': Graph(exported).model, 'half': Graph(exported).model, 'nan': graph.model}
    files['future'].opset_import[0].version = 99
    files['half'].graph.initializer.append(onnx.helper.make_tensor('half', onnx.TensorProto.FLOAT16, [1], [0]))
    for name, model in {**files, 'int8': quantization().quantized}.items():
        save_onnx(model, tmp_path / f'{name}.onnx')
    five = write_checkpoint(tiny_model(), tmp_path / 'five.pth.tar')
    before = sorted(tmp_path.rglob('*'))
    places = {'tmp': tmp_path, 'model': onnx_file, 'five': five, 'images': images, 'out': f'--out {tmp_path}/new.onnx'}
    assert_refused(command.format(**places).split(), message, capsys)
    assert sorted(tmp_path.rglob('*')) == before


def test_an_error_in_the_sensitivity_does_not_lose_the_quantized_file(onnx_file, images, tmp_path):
    (tmp_path / 'layers' / 'sensitivity.md').mkdir(parents=True)
    words = f'--images 9 --out {tmp_path}/new.onnx --sensitivity {tmp_path}/layers'
    assert main(['quantize', str(onnx_file), '--data', str(images), *words.split()]) == 1
    assert (tmp_path / 'new.onnx').exists()


def test_a_foreign_file_without_preprocessing_is_a_warning_wherever_it_is_read(exported, images, tmp_path, caplog):
    foreign = Graph(exported).model
    del foreign.metadata_props[:]
    save_onnx(foreign, tmp_path / 'foreign.onnx')
    file, data = str(tmp_path / 'foreign.onnx'), ['--data', str(images)]
    quantized = ['--images', '9', '--out', str(tmp_path / 'int8.onnx')]
    for words in (['evaluate', file, *data], ['quantize', file, *data, *quantized]):
        for told, more in ((1, []), (0, ['--mean', '0.5', '--std', '0.2'])):
            caplog.clear()
            assert main([*words, *more]) == 0
            assert caplog.text.count('--mean') == told


@pytest.mark.parametrize(('lacks', 'reduced', 'told'), [(True, False, 1), (True, True, 0), (False, False, 0)])
def test_an_int8_file_that_can_overflow_here_is_a_warning(
    lacks, reduced, told, quantization, images, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr('repopt_timm.deploy.classifier.lacks_vnni', lambda: lacks)
    save_onnx(quantization(reduce_range=reduced).quantized, tmp_path / 'int8.onnx')
    assert main(['evaluate', str(tmp_path / 'int8.onnx'), '--data', str(images)]) == 0
    assert caplog.text.count('--reduce-range') == told


@pytest.mark.parametrize(
    ('missing', 'command'),
    [
        ('onnxscript', 'export {checkpoint} --onnx {tmp}/new.onnx'),
        ('matplotlib', 'evaluate {model} --data {images} --out {tmp}/new'),
        ('sklearn', 'evaluate {model} --data {images} --out {tmp}/new'),
    ],
)
def test_what_is_not_installed_is_told_with_the_way_to_install_it(
    missing, command, checkpoint, onnx_file, images, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, missing, None)
    places = {'tmp': tmp_path, 'checkpoint': checkpoint, 'model': onnx_file, 'images': images}
    assert_refused(command.format(**places).split(), missing, capsys)
    assert not list(tmp_path.iterdir())
