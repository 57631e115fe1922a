import argparse
import pickle
import sys
import types

import pytest
import torch

from repopt_timm.checkpoints.read import read_checkpoint, select_state_dict


def config_node():
    """An object that pickles as `yacs.config.CfgNode` does: a dict with attributes."""
    module = types.ModuleType('yacs.config')
    node_class = type('CfgNode', (dict,), {'__module__': 'yacs.config', '__qualname__': 'CfgNode'})
    module.CfgNode = node_class
    node = node_class(MODEL=node_class(ARCH='RepOpt-VGG-B1-hs'), BASE=[''])
    node.__dict__['__immutable__'] = True
    return module, node


def test_the_reference_repositorys_configs_become_plain_dicts(tmp_path, monkeypatch):
    module, node = config_node()
    monkeypatch.setitem(sys.modules, 'yacs', types.ModuleType('yacs'))
    monkeypatch.setitem(sys.modules, 'yacs.config', module)
    torch.save({'model': {'a': torch.ones(1)}, 'config': node}, tmp_path / 'ckpt.pth')
    monkeypatch.undo()
    checkpoint = read_checkpoint(tmp_path / 'ckpt.pth')
    assert checkpoint['config'] == {'MODEL': {'ARCH': 'RepOpt-VGG-B1-hs'}, 'BASE': ['']}
    assert 'yacs.config' not in sys.modules


def test_timms_arguments_are_let_in(tmp_path):
    torch.save({'state_dict': {}, 'args': argparse.Namespace(model='x')}, tmp_path / 'last.pth.tar')
    assert read_checkpoint(tmp_path / 'last.pth.tar')['args'].model == 'x'


class Malicious:
    def __reduce__(self):
        return print, ('code from a checkpoint ran',)


def test_anything_else_is_refused_and_named(tmp_path, capsys):
    torch.save({'model': Malicious()}, tmp_path / 'evil.pth')
    with pytest.raises(ValueError, match=r"evil.pth' is refused: it would run code to restore .*print"):
        read_checkpoint(tmp_path / 'evil.pth')
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('content', [b'', b'not a checkpoint', pickle.dumps([1, 2])])
@pytest.mark.parametrize('name', ['broken.pth', 'broken.safetensors'])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        read_checkpoint(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'nowhere\.pth'):
        read_checkpoint(tmp_path / 'nowhere.pth')


@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', '_orig_mod.module.', 'module._orig_mod.'])
@pytest.mark.parametrize('nest', [lambda d: d, lambda d: {'state_dict': d}, lambda d: {'model': d, 'epoch': 3}])
def test_state_dicts_are_found_and_cleaned_of_wrappers(prefix, nest):
    assert list(select_state_dict(nest({f'{prefix}head.fc.weight': torch.ones(1)}))) == ['head.fc.weight']


def test_averaged_weights_come_first():
    checkpoint = {'state_dict': {'a': torch.zeros(1)}, 'state_dict_ema': {'a': torch.ones(1)}}
    assert select_state_dict(checkpoint)['a'] == 1
