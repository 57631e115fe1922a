import argparse
import pickle
import sys
import types

import pytest
import torch
from safetensors.torch import save_file

from repopt_timm.checkpoints.read import check_weights, checkpoint_of, read_checkpoint, select_state_dict


@pytest.mark.parametrize('kept', [['last.pth.tar'], ['model_best.pth.tar'], ['last.pth.tar', 'model_best.pth.tar']])
def test_the_folder_of_a_run_stands_for_its_best_checkpoint_or_the_last(tmp_path, kept):
    for name in kept:
        (tmp_path / name).touch()
    assert checkpoint_of(tmp_path) == tmp_path / kept[-1]


def test_configs_of_the_reference_repository_become_dicts_and_timms_arguments_stay(tmp_path, monkeypatch):
    module = types.ModuleType('yacs.config')
    module.CfgNode = type('CfgNode', (dict,), {'__module__': 'yacs.config', '__qualname__': 'CfgNode'})
    monkeypatch.setitem(sys.modules, 'yacs', types.ModuleType('yacs'))
    monkeypatch.setitem(sys.modules, 'yacs.config', module)
    node = module.CfgNode(MODEL=module.CfgNode(ARCH='RepOpt-VGG-B1-hs'), BASE=[''])
    node.__dict__['__immutable__'] = True
    torch.save({'config': node, 'args': argparse.Namespace(model='x')}, tmp_path / 'ckpt.pth')
    monkeypatch.undo()
    checkpoint = read_checkpoint(tmp_path / 'ckpt.pth')
    assert checkpoint['config'] == {'MODEL': {'ARCH': 'RepOpt-VGG-B1-hs'}, 'BASE': ['']}
    assert checkpoint['args'].model == 'x'
    assert 'yacs.config' not in sys.modules


class Malicious:
    def __reduce__(self):
        return print, ('code from a checkpoint ran',)


@pytest.mark.parametrize('zipped', [True, False])
def test_what_would_run_code_is_refused_and_named(tmp_path, capsys, zipped):
    torch.save({'model': Malicious()}, tmp_path / 'evil.pth', _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r'evil\.pth.*print'):
        read_checkpoint(tmp_path / 'evil.pth')
    assert capsys.readouterr().out == ''


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize(('name', 'save'), [('broken.pth', torch.save), ('broken.safetensors', save_file)])
def test_a_file_that_is_no_checkpoint_or_is_cut_off_is_named(tmp_path, name, save):
    file = tmp_path / name
    with pytest.raises(FileNotFoundError, match=name):
        read_checkpoint(file)
    save({'a': torch.ones(1000)}, file)
    content = file.read_bytes()
    parts = [content[: int(share * len(content))] for share in (0, 0.003, 0.5, 0.999)]
    for broken in (*parts, b'not a checkpoint', pickle.dumps([1, 2]), pickle.dumps([1, 2], 2)):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=name):
            read_checkpoint(file)


def test_a_flipped_bit_of_a_weight_is_found(tmp_path):
    file, weight = tmp_path / 'flipped.pth', torch.full((100,), 3.0)
    torch.save({'a': weight}, file)
    content = bytearray(file.read_bytes())
    content[content.index(weight.numpy().tobytes())] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r'flipped\.pth.*checksum'):
        read_checkpoint(file)


@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.module.', 'module._orig_mod.'])
def test_state_dicts_are_found_and_cleaned_of_wrappers(prefix):
    state, other = {f'{prefix}fc.weight': torch.ones(1)}, {'fc.weight': torch.zeros(1)}
    for checkpoint in (state, {'model': state, 'epoch': 3}, {'state_dict': other, 'state_dict_ema': state}):
        assert select_state_dict(checkpoint) == {'fc.weight': 1}


WEIGHTS = {
    'conv.weight': torch.randn(4, 4, 3, 3),
    'half.weight': torch.full((4, 4), 60_000.0, dtype=torch.float16),
    'bn.running_var': torch.zeros(4),
    'bn.running_mean': torch.tensor([-1e12]),
    'bn.num_batches_tracked': torch.tensor(7),
    'attn.attention_bias_idxs': torch.arange(4),
}


@pytest.mark.parametrize(
    ('name', 'tensor'),
    [
        ('conv.weight', torch.tensor([1.0, float('nan')])),
        ('conv.weight', torch.tensor([1.0, -float('inf')], dtype=torch.bfloat16)),
        ('conv.weight', 1e38 * torch.randn(4, 4, 3, 3)),
        ('conv.weight', torch.full((2,), 1e300, dtype=torch.float64)),
        ('conv.weight', torch.ones(2, dtype=torch.int8)),
        ('bn.num_batches_tracked', torch.ones(2, dtype=torch.complex64)),
        ('bn.running_var', torch.tensor([1.0, -1e-6])),
    ],
)
def test_weights_that_no_network_computes_with_are_named_with_their_file(name, tensor):
    check_weights(WEIGHTS, 'last.pth')
    with pytest.raises(ValueError, match=rf"last\.pth: '{name}'"):
        check_weights({**WEIGHTS, name: tensor}, 'last.pth')
