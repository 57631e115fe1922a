"""The Python of docs/deployment.md runs as it stands."""

import re
import runpy
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from PIL import Image

from repopt_timm import make_grad_mults
from repopt_timm.deploy import QuantizationOptions, export_onnx, quantize_onnx, save_onnx

DOCS = Path(__file__).parents[2] / 'docs'
PAGE = (DOCS / 'deployment.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'^```python\n(.+?)^```', PAGE, re.M | re.S)


def run(word):
    names: dict = {}
    (block,) = (block for block in BLOCKS if word in block)
    exec(compile(block, '<docs/deployment.md>', 'exec'), names)
    return names


def test_onnx_runtime_alone_classifies_a_photograph(named, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    export_onnx(named, 'a0.onnx', batch=1)
    quantized = quantize_onnx('a0.onnx', images, QuantizationOptions(images=12)).quantized
    for int8 in (False, True):
        if int8:
            save_onnx(quantized, 'a0.onnx')
        for name in ('dark', 'light'):
            Image.open(images / 'validation' / name / '0.png').resize((50, 40)).save('photo.jpg')
            run('photo.jpg')
            assert capsys.readouterr().out == f'{name}\n'


@pytest.mark.slow
def test_a_segmentation_network_is_exported_by_torch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    segmenter = run('Segmenter')['segmenter']
    pixels = torch.randn(3, 3, 64, 64)
    session = onnxruntime.InferenceSession('segmenter.onnx')
    (found,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(found), segmenter(pixels), rtol=1e-3, atol=1e-4)


def test_a_library_trains_in_int8_with_the_grad_mults_of_the_network_by_name():
    pytest.importorskip('torchao', reason='pip install torchao')
    names = run('prepare_qat_pt2e')
    scales = names['scales']
    trained = dict(names['network'].named_parameters())
    plain = timm.create_model('test_repopt_vgg', num_classes=5)
    expected = {name: make_grad_mults(plain, scales).get(value) for name, value in plain.named_parameters()}
    for name in scales:
        parameter = trained[f'{name}.weight']
        assert torch.equal(names['mults'][parameter], expected[f'{name}.weight'])
        assert names['optimizer'].state[parameter]['momentum_buffer'].any()
    assert names['quantized'](names['loader'][0][0]).isfinite().all()


@pytest.mark.parametrize(('script', 'needed'), [('int8', 'pandas'), ('qat', 'torchao'), ('runtimes', 'openvino')])
def test_scripts_that_measure_int8_find_what_they_import(script, needed):
    pytest.importorskip(needed)
    assert runpy.run_path(str(DOCS / 'evidence' / f'{script}.py'))['main']
