import argparse
import json
import pickle
import struct
import sys
import time
import types
import zipfile

import pytest
import torch
from safetensors.torch import save_file

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


@pytest.mark.parametrize('name', ['whole.pth', 'whole.safetensors'])
@pytest.mark.parametrize('share', [0.003, 0.5, 0.999])
def test_a_file_that_is_cut_off_says_to_copy_it_again(tmp_path, name, share):
    save = save_file if name.endswith('.safetensors') else torch.save
    save({'a': torch.ones(1000)}, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf'{name}.*Copy or download it again\.$') as caught:
        read_checkpoint(tmp_path / name)
    assert 'weights_only' not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint '.*nowhere\.pth', expected a file such as"):
        read_checkpoint(tmp_path / 'nowhere.pth')


@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', '_orig_mod.module.', 'module._orig_mod.'])
@pytest.mark.parametrize('nest', [lambda d: d, lambda d: {'state_dict': d}, lambda d: {'model': d, 'epoch': 3}])
def test_state_dicts_are_found_and_cleaned_of_wrappers(prefix, nest):
    assert list(select_state_dict(nest({f'{prefix}head.fc.weight': torch.ones(1)}))) == ['head.fc.weight']


def test_averaged_weights_come_first():
    checkpoint = {'state_dict': {'a': torch.zeros(1)}, 'state_dict_ema': {'a': torch.ones(1)}}
    assert select_state_dict(checkpoint)['a'] == 1


def packed(path):
    """A file of a kilobyte that unpacks to 16 MB."""
    torch.save({'w': torch.zeros(1)}, path.with_suffix('.plain'))
    with zipfile.ZipFile(path.with_suffix('.plain')) as plain, zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as bomb:
        for part in plain.namelist():
            bomb.writestr(part, bytes(1 << 24) if part.endswith('data/0') else plain.read(part))


def many_tensors(path, count=60_000):
    empty = {'dtype': 'F32', 'shape': [0], 'data_offsets': [0, 0]}
    header = json.dumps({f't{index}': empty for index in range(count)}).encode()
    path.write_bytes(len(header).to_bytes(8, 'little') + header)


def shared_lists(path):
    nested: list = []
    for _ in range(40):
        nested = [nested, nested]
    torch.save({'state_dict': {}, 'history': nested}, path)


def deep_lists(path):
    nested: list = []
    for _ in range(80):
        nested = [nested]
    torch.save({'state_dict': {}, 'history': nested}, path)


def hash_bomb(levels=30):
    """A pickle of a dict whose key is a tuple of twice the same tuple, and so on."""
    return b'\x80\x02}K\x01' + b'q\x00h\x00\x86' * levels + b'K\x01s.'


def archive(path, *parts):
    with zipfile.ZipFile(path, 'w') as file:
        for name, content in parts:
            file.writestr(name, content)


def many_parts(path):
    # The directory alone, as what it lists is not looked at.
    entry = b'PK\x01\x02' + bytes(42)
    end = struct.pack('<4s4H2LH', b'PK\x05\x06', 0, 0, 0xFFFF, 0xFFFF, 60_000 * len(entry), 0, 0)
    path.write_bytes(entry * 60_000 + end)


@pytest.mark.parametrize(
    ('name', 'write', 'message'),
    [
        ('a.safetensors', many_tensors, 'a header of 60001 tensors, expected at most 50000'),
        ('a.safetensors', lambda path: path.write_bytes(b'\xff' * 6 + bytes(90)), 'a header of 281474976710655 bytes'),
        ('a.pth', packed, 'unpack to 16777.* bytes, more than the file has'),
        ('a.pth', lambda path: path.write_bytes(b'\x80\x02' + b'N0' * 600_000 + b'N.'), 'more than 1000000 steps'),
        ('a.pth', lambda path: path.write_bytes(b'\x80\x02' + b'}}R0' * 60_000 + b'N.'), 'or 50000 calls, to unpickle'),
        ('a.pth', lambda path: archive(path, ('a/data.pkl', hash_bomb())), 'more than 1000000 steps'),
        ('a.pth', lambda path: archive(path, ('a/DATA.PKL', hash_bomb())), 'more than 1000000 steps'),
        (
            'a.pth',
            lambda path: archive(path, ('a/data.pkl', hash_bomb()), ('a/data.pkl', b'N.')),
            'more than 1000000 steps',
        ),
        ('a.pth', lambda path: path.write_bytes(b'N.' * 4 + hash_bomb()), 'more than 1000000 steps'),
        ('a.pth', lambda path: path.write_bytes(b'}K\x01' + b'\x85' * 500_000 + b'K\x01s.'), 'more than 64 levels'),
        ('a.pth', many_parts, 'it has 60000 parts, expected at most 50000'),
        ('a.pth', shared_lists, 'more than 300000 values'),
        ('a.pth', deep_lists, '64 levels'),
        ('a.pth', lambda path: torch.save({'w': torch.zeros(1).expand(10**6, 10**6)}, path), 'claim more values than'),
    ],
    ids=[
        'tensors',
        'header',
        'zip bomb',
        'steps',
        'calls',
        'hash bomb',
        'hash bomb in capitals',
        'first of two',
        'last pickle',
        'nested tuples',
        'parts',
        'shared lists',
        'deep lists',
        'expanded tensor',
    ],
)
def test_what_claims_more_than_any_checkpoint_is_refused_at_once(tmp_path, name, write, message):
    write(tmp_path / name)
    start = time.process_time()
    with pytest.raises(ValueError, match=rf"{name}' .*{message}"):
        read_checkpoint(tmp_path / name)
    assert time.process_time() - start < 5
