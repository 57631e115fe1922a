import json

import pytest
import torch

from repopt_timm.cli import main


@pytest.fixture
def bench(tmp_path, capsys):
    """Runs a benchmark and returns what it printed and wrote."""

    def run(*arguments):
        files = tmp_path / 'results.json', tmp_path / 'results.png'
        assert main(['bench', *arguments, '--json', str(files[0]), '--plot', str(files[1])]) == 0
        assert files[1].stat().st_size > 5000
        return capsys.readouterr().out, json.loads(files[0].read_text())

    return run


def values(results, what):
    return {row['contender']: row['value'] for row in results['rows'] if row['what'] == what}


@pytest.mark.slow
def test_optimizer_shows_that_grad_mults_cost_little_and_leave_gradients_alone(bench):
    out, results = bench('optimizer', '--quick', '--no-compiled', '--device', 'cpu')
    held = values(results, 'sgd: memory of the Grad Mults')
    assert 0 < held['RepOptSGD'] < 0.1 * held['dense masks, SGD fused']
    changed = values(results, 'adamw: gradients that a step changes')
    assert changed['RepOptAdamW'] == 0
    assert changed['dense masks, AdamW fused'] > 0
    assert results['environment']['torch'] == torch.__version__
    assert '<= 1.25 x' in out
    assert 'On a CUDA device it would measure' in out


def test_search_shows_what_separate_branches_save(bench):
    _, results = bench('search', '--quick', '--device', 'cpu')
    saved = values(results, 'saved activations, 32 px, batch 2, float32')
    target, search, separate = saved.values()
    assert target == search < separate


def test_train_compares_training_and_inference(bench):
    _, results = bench('train', '--quick', '--device', 'cpu', '--precision', 'bfloat16')
    rows = {(row['what'], row['contender']): row for row in results['rows']}
    cell = '32 px, batch 2, bfloat16'
    assert rows[f'training step, {cell}', 'test_repopt_vgg']['goal'] == '< 1 x'
    saved = rows[f'saved activations, {cell}', 'test_repopt_vgg']
    assert saved['value'] < rows[f'saved activations, {cell}', 'test_repvgg']['value']
    assert saved['reached'] == (saved['ratio']['median'] <= 0.6)
    # Autocast keeps copies of the kernels, which are no activations.
    assert saved['value'] < 0.5 * rows[f'saved in all, {cell}', 'test_repopt_vgg']['value']
    folded = rows[f'inference, {cell}', 'test_repopt_vgg, BatchNorm folded']
    assert folded['baseline'] == 'test_repvgg, reparameterized'
    assert folded['goal'].startswith('1 ± ')


@pytest.mark.slow
def test_train_compares_a_network_with_branches_with_its_plain_twin(bench):
    twins = 'repopt_mobileone_s0', 'repopt_repvgg_a0'
    _, results = bench('train', '--quick', '--device', 'cpu', '--precision', 'float32', '--model', *twins)
    rows = {(row['what'], row['contender']): row for row in results['rows']}
    saved = rows['saved activations, 32 px, batch 2, float32', 'mobileone_s0']
    assert saved['baseline'] == 'repopt_mobileone_s0'
    assert saved['ratio']['median'] == pytest.approx(2.5, abs=0.2)
    assert rows['training step, 32 px, batch 2, float32', 'mobileone_s0']['goal'] == '>= 4 x'
    parameters = [rows['parameters in training, repvgg_a0', name]['value'] for name in (twins[1], 'repvgg_a0')]
    assert parameters == [8.31, 9.11]
    assert results['settings']['model'] == 'repopt_mobileone_s0, repopt_repvgg_a0'


@pytest.mark.slow
def test_scaling_goes_along_four_axes(bench):
    _, results = bench('scaling', '--quick', '--device', 'cpu', '--img-size', '128', '224', '--repeats', '1')
    axes = {row['what']: [] for row in results['rows']}
    for row in results['rows']:
        if row['contender'] == 'test_repopt_vgg':
            axes[row['what']].append((row['at'], row['value']))
    assert [at for at, _ in axes['step time against resolution']] == [128, 224]
    for axis in ('width', 'depth', 'batch', 'resolution'):
        (_, small), (_, large) = axes[f'peak memory against {axis}']
        assert small < large


def test_memory_tells_the_largest_batch_that_fits_gpus(bench):
    out, results = bench('memory', '--model', 'repopt_vgg_a0', '--precision', 'float32')
    assert 'fits 16 GiB' in out
    fits = {(row['contender'], row['at']): row['value'] for row in results['rows'] if 'largest' in row['what']}
    assert fits['repvgg_a0', 16] < fits['repopt_vgg_a0', 16] < fits['repopt_vgg_a0', 24]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['train', '--model', 'resnet18', '--device', 'cpu'], 'expected a RepOpt-VGG target'),
        (['train', '--device', 'mps'], "--device is 'mps', expected cpu, cuda or cuda:N"),
        (['train', '--device', 'nowhere'], "--device is 'nowhere', expected cpu, cuda or cuda:N"),
        (['train', '--device', 'cuda:x'], "--device is 'cuda:x', expected cpu, cuda, cuda:1"),
        (['train', '--device', 'cpu:3'], "--device is 'cpu:3', which this machine does not have"),
        (['train', '--device', 'cuda:99'], "--device is 'cuda:99', which this machine does not have"),
    ],
)
def test_an_error_is_one_clear_line(arguments, message, capsys):
    assert main(['bench', *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith('error: ')
    assert message in error
    assert error.count('\n') == 1
