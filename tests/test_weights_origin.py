"""Where weights come from survives saving, loading and fine-tuning."""

import argparse

import pytest
import timm
import torch

from repopt_timm import save_pretrained
from repopt_timm.checkpoint_model import model_from_checkpoint
from repopt_timm.merge_checkpoint import merge_trained
from repopt_timm.train.command import main as train
from repopt_timm.weights_origin import merged_from, note_merged, origin_of, restore_origin

from .helpers import TINY, card_of, tiny_model


def merged(license_name='mit'):
    model = tiny_model(num_classes=10)
    restore_origin(model, {'license': license_name})
    note_merged(model, 'timm/net.in1k')
    return model


def test_a_saved_model_says_what_its_weights_were_merged_from_once_loaded_again(tmp_path):
    save_pretrained(merged(), tmp_path / 'first')
    model = timm.create_model(f'local-dir:{tmp_path / "first"}', pretrained=True)
    assert merged_from(model) == 'timm/net.in1k'
    save_pretrained(model, tmp_path / 'second')
    assert 'branches, as timm/net.in1k; merged into plain kernels' in card_of(tmp_path / 'second').text
    assert card_of(tmp_path / 'second').data.license == 'mit'
    assert origin_of(timm.create_model(f'local-dir:{tmp_path / "first"}')) == {}
    assert origin_of(timm.create_model('repopt_repvgg_d2se', device='meta')) == {}


def test_fine_tuning_keeps_the_origin(tmp_path):
    torch.save({'state_dict': merged().state_dict(), 'origin': origin_of(merged())}, tmp_path / 'model.pth')
    command = ['--model', TINY, '--initial-checkpoint', str(tmp_path / 'model.pth')]
    command += ['--dataset', 'digits', '--opt', 'sgd', '--epochs', '1', '--img-size', '32']
    train([*command, '--train-images', '64', '-b', '32', '--workers', '0', '--output', str(tmp_path / 'run')])
    (checkpoint,) = tmp_path.glob('run/*/last.pth.tar')
    tuned = model_from_checkpoint(checkpoint)
    assert origin_of(tuned) == {'license': 'mit', 'notes': ['merged from timm/net.in1k']}
    save_pretrained(checkpoint, tmp_path / 'tuned')
    text = card_of(tmp_path / 'tuned').text
    assert 'branches, as timm/net.in1k; merged into plain kernels; then trained as stated here' in text


def test_a_converted_checkpoint_names_the_network_with_branches(tmp_path):
    origin = {'license': 'mobileone-license'}
    content = {'arch': f'{TINY}_branches', 'state_dict': tiny_model('_branches').state_dict(), 'origin': origin}
    torch.save(content, tmp_path / 'last.pth.tar')
    plain = merge_trained(str(tmp_path / 'last.pth.tar'))
    assert origin_of(plain) == {**origin, 'notes': [f'merged from {TINY}_branches']}


@pytest.mark.parametrize(
    'origin',
    [5, 'mit', [1], {'license': 5, 'notes': 7}, {'license': 'a\nb', 'notes': [3]}, {'license': '<img>'}],
)
def test_a_malformed_origin_is_ignored(origin):
    model = merged()
    restore_origin(model, origin)
    assert origin_of(model) == {}
    model.pretrained_cfg |= origin if isinstance(origin, dict) else {}
    assert merged_from(model) == ''


def test_a_note_of_a_merge_stands_beside_other_notes():
    model = merged()
    restore_origin(model, {'license': 'MIT', 'notes': ['merged from a', 'mine']})
    note_merged(model, 'b')
    assert origin_of(model) == {'license': 'mit', 'notes': ['merged from b', 'mine']}


def test_what_timms_script_fine_tuned_has_the_licence_that_timm_states(tmp_path):
    model = timm.create_model('test_resnet')
    args = argparse.Namespace(model_kwargs={}, pretrained=True)
    torch.save({'arch': 'test_resnet', 'state_dict': model.state_dict(), 'args': args}, tmp_path / 'last.pth.tar')
    assert origin_of(model_from_checkpoint(tmp_path / 'last.pth.tar'))['license'] == 'apache-2.0'
