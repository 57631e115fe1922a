import copy
import json
from argparse import Namespace
from dataclasses import asdict

import pytest
import torch
from timm.utils import reparameterize_model
from torch import nn

from repopt_timm import RepOptAdamW, RepOptSGD, Scales, attach_scales, csla, make_grad_mults, to_plain
from repopt_timm.cli import main
from repopt_timm.deploy import QuantizationOptions, evaluate, qat, qat_command
from repopt_timm.deploy.onnx_network import OnnxNetwork
from repopt_timm.deploy.qat import folded_grad_mults
from repopt_timm.deploy.trained_model import load_trained

from ..helpers import TINY, random_scales, tiny_model
from ..train.runs import read
from .conftest import trained, write_checkpoint

SETTINGS = {
    'sgd': (RepOptSGD, torch.optim.SGD, {'lr': 0.05, 'momentum': 0.9, 'nesterov': True, 'weight_decay': 0.01}),
    'adamw': (RepOptAdamW, torch.optim.AdamW, {'lr': 0.001, 'eps': 1e-30, 'weight_decay': 0.01}),
}


def with_statistics(model):
    """Gives BatchNorm factors of both signs, and far from 1."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.2, 2.0)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.weight, 0.3, 1.5)
            with torch.no_grad():
                module.weight[::5] *= -1
    return model


def groups(named):
    """Biases without weight decay, as timm's factory has it."""
    parameters = [parameter for _, parameter in named]
    return [
        {'params': [each for each in parameters if each.ndim > 1]},
        {'params': [each for each in parameters if each.ndim == 1], 'weight_decay': 0.0},
    ]


@pytest.mark.parametrize('rule', SETTINGS)
@pytest.mark.parametrize('fold', [True, False], ids=['folded', 'not adapted'])
def test_folded_kernels_train_like_the_csla_network_with_frozen_batchnorm(rule, fold):
    ours, plain_optimizer, kwargs = SETTINGS[rule]
    twin = with_statistics(csla(tiny_model(scales=random_scales()).double())).eval()
    model = to_plain(twin)
    network = reparameterize_model(copy.deepcopy(model))
    network.requires_grad_(True)
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(not name.endswith('bn.weight'))
    mults = (
        folded_grad_mults(model, network, rule) if fold else make_grad_mults(network, Scales.from_model(model), rule)
    )
    optimizers = [
        ours(groups(network.named_parameters()), grad_mults=mults, **kwargs),
        plain_optimizer(groups(p for p in twin.named_parameters() if p[1].requires_grad), **kwargs),
    ]
    images, targets = torch.randn(8, 3, 8, 8).double(), torch.arange(8) % 5
    for _ in range(5):
        for each, optimizer in zip((network, twin), optimizers):
            optimizer.zero_grad()
            nn.functional.cross_entropy(each(images), targets).backward()
            optimizer.step()
    difference = (network(images) - twin(images)).abs().max().item()
    assert (difference < 1e-12) is fold


def test_grad_mults_of_the_exported_network_are_found_by_name(checkpoint, exported):
    model = load_trained(checkpoint)
    attach_scales(model, random_scales(num_classes=3))
    network = OnnxNetwork(exported)
    network.architecture = model.architecture
    found, plain = folded_grad_mults(model, network), make_grad_mults(model)
    assert len(found) == len(plain) == 7
    for name in ('stem', 'stages.0.0', 'stages.3.0'):
        block = model.get_submodule(name)
        factor = block.bn.weight.square() / (block.bn.running_var + block.bn.eps)
        expected = plain[block.conv.weight].dense() * factor.view(-1, 1, 1, 1)
        torch.testing.assert_close(found[network.get_parameter(f'{name}.conv.weight')].dense(), expected)


def test_a_kernel_that_is_more_than_folded_is_named():
    model = tiny_model(scales=random_scales()).eval()
    network = reparameterize_model(copy.deepcopy(model))
    nn.init.normal_(network.stem.conv.weight)
    with pytest.raises(ValueError, match=r"The kernel of 'stem\.conv' .* its Grad Mult is unknown"):
        folded_grad_mults(model, network)


@pytest.mark.slow
def test_a_trained_file_runs_with_the_accuracy_that_training_saw(images, tmp_path, capsys):
    scales = random_scales(num_classes=3)
    scales.save(tmp_path / 'scales.safetensors')
    model = trained(TINY, scales=scales)
    model.stages[0][0].bn.bias.data[0] = -100
    checkpoint = write_checkpoint(model, tmp_path / 'last.pth.tar')
    out = tmp_path / 'out.onnx'
    words = f"""qat {checkpoint} --data {images} --out {out} --scales {tmp_path / 'scales.safetensors'} --weight-bits 4
        --epochs 2 -b 12 --no-aug --output {tmp_path} --experiment run --workers 0 --images 20 --json""".split()
    assert main(words) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert 'never changed on these 20 images: stages.1.0.conv 1' in printed.err
    assert abs(found['top1'] - found['fake_quantized']) <= 0.2
    assert found['top1'] > 90
    assert evaluate(out, images)['top1'] == found['top1']
    assert read(tmp_path / 'run')['optimizer']['param_groups'][0]['scales_fingerprint'] == scales.fingerprint
    assert not [name for name in read(tmp_path / 'run')['state_dict'] if 'activation' in name]
    assert main(['doctor', str(tmp_path / 'run')]) == 0
    capsys.readouterr()
    # Once more, from the end of the run.
    first = out.read_bytes()
    out.unlink()
    assert main([*words, '--resume']) == 0
    assert out.read_bytes() == first
    capsys.readouterr()
    assert main([*words, '--resume', '--override', '--weight-bits', '8']) == 1
    assert 'was quantized otherwise: weight_bits 4 -> 8. Its weights' in capsys.readouterr().err
    assert main(['quantize', str(tmp_path / 'run' / 'last.pth.tar'), '--data', str(images), '--out', str(out)]) == 1
    assert 'is of a fake-quantized training' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'kwargs', 'arguments'),
    [
        (TINY, {'scales': random_scales(num_classes=3)}, '--opt repopt_adamw --lr 1e-4'),
        (TINY, {'scales': random_scales(num_classes=3)}, '--model-ema --model-ema-decay 0.5'),
        ('repopt_mobileone_s0', {}, '--images 4 --opt adamw --lr 1e-3'),
    ],
    ids=['repopt_adamw', 'moving average', 'repopt_mobileone_s0'],
)
def test_so_it_does_for_other_optimizers_averages_and_networks(name, kwargs, arguments, images, tmp_path, capsys):
    checkpoint, out = write_checkpoint(trained(name, **kwargs), tmp_path / 'last.pth.tar'), tmp_path / 'out.onnx'
    if kwargs:
        kwargs['scales'].save(tmp_path / 'scales.safetensors')
        arguments += f' --scales {tmp_path}/scales.safetensors'
    words = f"""qat {checkpoint} --data {images} --out {out} --output {tmp_path} --epochs 2 -b 12 --no-aug --workers 0
        --json {arguments}""".split()
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['top1'] > 60
    assert abs(found['top1'] - found['fake_quantized']) <= 0.2
    assert evaluate(out, images)['top1'] == found['top1']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('{checkpoint} --data {images} --out {tmp}', 'is a folder'),
        ('{checkpoint} --data {tmp}/nowhere --out {tmp}/new.onnx', 'There is no image folder'),
        # The result is measured on a split, whatever the training holds out.
        ('{checkpoint} --data {old} --holdout 0.5 --out {tmp}/new.onnx', 'is one file, expected one for each split'),
        ('{tmp}/nowhere.pth --data {images} --out {tmp}/new.onnx', 'There is no checkpoint'),
        ('{checkpoint} --data {images} --out {tmp}/new.onnx --model resnet18', 'remove --model'),
        ('{checkpoint} {images} --data {images} --out {tmp}/new.onnx', '--data: remove /'),
        ('{checkpoint} --data {images} --out {tmp}/new.onnx --epochs 0', '--epochs is 0, expected'),
        ('{checkpoint} --data {images} --out {tmp}/new.onnx --percentile 3', 'expected more than 50'),
        ('{checkpoint} --data {images} --out {tmp}/new.onnx --opt repopt_sgd', 'carries no scales'),
        ('{checkpoint} --data {images} --out {tmp}/new.onnx --scales {scales} --equalize', 'has no Grad Mults'),
        ('{five} --data {images} --out {tmp}/new.onnx', 'The model has 5 classes'),
        (
            '{checkpoint} --data {images} --out {tmp}/new.onnx --resume {old} --override --percentile 80',
            'was quantized otherwise: percentile 99.99 -> 80.0, other weights.',
        ),
        (
            '{checkpoint} --data {images} --out {tmp}/new.onnx --resume {ordinary}',
            'is a run of `repopt-timm train`, expected one of `repopt-timm qat`',
        ),
    ],
)
def test_bad_input_is_said_before_the_calibration(
    arguments, message, checkpoint, images, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(qat, 'fake_quantize', lambda *args: pytest.fail('the work began'))
    write_checkpoint(tiny_model(), tmp_path / 'five.pth.tar')
    random_scales(num_classes=3).save(tmp_path / 'scales.safetensors')
    saved = {**asdict(QuantizationOptions()), 'weight_bits': 8, 'weights_before': 'of another model'}
    torch.save({'history': [{'epoch': 0}], 'args': Namespace(quantization=saved)}, tmp_path / 'old.pth.tar')
    torch.save({'history': [{'epoch': 0}], 'args': Namespace()}, tmp_path / 'ordinary.pth.tar')
    places = {'tmp': tmp_path, 'checkpoint': checkpoint, 'images': images, 'five': tmp_path / 'five.pth.tar'}
    places |= {'scales': tmp_path / 'scales.safetensors', 'old': tmp_path / 'old.pth.tar'}
    places['ordinary'] = tmp_path / 'ordinary.pth.tar'
    words = [*arguments.format(**places).split(), '--output', str(tmp_path / 'runs')]
    assert main(['qat', *words]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'runs').exists()


@pytest.mark.parametrize(
    ('arguments', 'vnni', 'expected'),
    [
        (
            '',
            True,
            ['8-bit weights,', 'trained for 1 epoch\n', 'by 1 of 200 images: sums in another order'],
        ),
        (
            '--target tensorrt --weight-bits 4 --model-ema',
            True,
            ['4-bit weights kept in float32,', 'average of weights'],
        ),
        ('', False, ['by 1 of 200 images: this CPU has no VNNI', 'Repeat it with --reduce-range']),
        ('--reduce-range', False, ['sums in another order']),
    ],
)
def test_a_result_says_what_was_written_and_why_accuracies_differ(
    arguments, vnni, expected, checkpoint, images, tmp_path, capsys, monkeypatch
):
    accuracies = {'float32': 90.0, 'untrained': 50.0, 'fake_quantized': 90.0, 'top1': 89.5}
    result = {'bytes': 1000, 'epochs': 1, 'images': 200, **accuracies}
    monkeypatch.setattr(qat_command, 'train_quantized', lambda *args: result)
    monkeypatch.setattr(qat_command, 'cpu_name', lambda: ('a CPU', vnni))
    monkeypatch.setattr('platform.machine', lambda: 'x86_64')
    assert (
        main(['qat', str(checkpoint), '--data', str(images), '--out', f'{tmp_path}/out.onnx', *arguments.split()]) == 0
    )
    out = capsys.readouterr().out
    assert all(text in out for text in expected)


def test_a_config_of_the_training_before_it_does_not_change_the_fine_tuning(tmp_path):
    config = tmp_path / 'args.yaml'
    config.write_text('lr: 0.1\nmin_lr: 0.02\nepochs: 90\ncooldown_epochs: 9\nweight_decay: 0.5\nreprob: 0.25\n')
    words = ['-c', str(config), '--data-dir', 'photos']
    args = qat_command._training_arguments(words, 'qat')
    assert (args.lr, args.lr_base, args.lr_base_size, args.min_lr, args.warmup_epochs) == (None, 0.01, 256, 0.0, 0)
    assert (args.epochs, args.cooldown_epochs, args.weight_decay, args.reprob) == (3, 0, 4e-5, 0.25)
    assert qat_command._training_arguments([*words, '--lr', '0.2'], 'qat').lr == 0.2
