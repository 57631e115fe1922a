import argparse

import pytest
import timm
import torch
from timm.models import reparameterize_model, save_for_hf

from repopt_timm import Scales, implied_scales
from repopt_timm.cli import main
from repopt_timm.merge_checkpoint import merge_trained

from .blocks.block_examples import randomized
from .helpers import TINY, card_of, relative_difference, tiny_model

IMAGES = torch.randn(2, 3, 64, 64)
NUMBERS = {'depths': (1, 1), 'widths': (8, 8, 16)}


@pytest.fixture
def trained():
    return randomized(tiny_model('_branches', **NUMBERS))


@pytest.fixture
def checkpoint(trained, tmp_path):
    """As a run leaves it."""
    args = argparse.Namespace(model_kwargs=NUMBERS, input_size=[3, 64, 64])
    path = tmp_path / 'last.pth.tar'
    torch.save({'arch': f'{TINY}_branches', 'state_dict': trained.state_dict(), 'args': args}, path)
    return path


def test_a_trained_checkpoint_becomes_the_plain_network_and_images_change_its_statistics_alone(
    trained, checkpoint, images, tmp_path
):
    out = tmp_path / 'out'
    command = f'convert-checkpoint {checkpoint.parent} --out {out} --data {images} --scales implied --license mit'
    assert main(command.split()) == 0
    plain = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    assert plain.pretrained_cfg['architecture'] == TINY
    assert Scales.from_model(plain) == implied_scales(trained).renamed(TINY)
    estimated = merge_trained(str(checkpoint))
    assert relative_difference(estimated, plain) > 0.01
    for model in (estimated, plain):
        torch.testing.assert_close(model(IMAGES), trained(IMAGES), rtol=1e-4, atol=1e-5)
    card = card_of(out)
    assert 'branches; merged into plain kernels' in card.text and str(checkpoint.parent) not in str(card)
    assert 'measured on images of' in card.text and card.data.license == 'mit'
    # How implied scales were made is part of them.
    assert '| method |' in card.text and 'Not recorded' not in card.text


def test_no_path_of_the_machine_is_published(trained, tmp_path):
    save_for_hf(trained, tmp_path / 'secret')
    assert main(['convert-checkpoint', f'local-dir:{tmp_path / "secret"}', '--out', str(tmp_path / 'out')]) == 0
    assert all(str(tmp_path) not in (tmp_path / 'out' / name).read_text() for name in ('README.md', 'config.json'))


@pytest.mark.parametrize('name', [f'{TINY}_branches', 'repghostnet_050'])
def test_a_file_of_tensors_needs_the_name_of_its_network(name, tmp_path):
    branches = timm.create_model(name, num_classes=5).eval()
    torch.save(branches.state_dict(), tmp_path / 'weights.pth')
    plain = merge_trained(str(tmp_path / 'weights.pth'), name)
    torch.testing.assert_close(plain(IMAGES), branches(IMAGES), rtol=1e-4, atol=1e-5)


def test_what_has_no_branches_is_refused(tmp_path):
    torch.save({'arch': TINY, 'state_dict': tiny_model().state_dict()}, tmp_path / 'plain.pth')
    with pytest.raises(ValueError, match=r'plain\.pth.*no branches.*repopt-timm save'):
        merge_trained(str(tmp_path / 'plain.pth'))
    with pytest.raises(FileNotFoundError, match=r'mobileone_s0\.pth'):
        merge_trained('mobileone_s0.pth')


@pytest.mark.parametrize(
    ('name', 'stated'), [('mobileone_s0', True), ('repvgg_a0', False), ('repvit_m0_9', True), ('repvit_m0_9', False)]
)
def test_a_network_that_timm_has_fused_is_called_that(name, stated, tmp_path):
    fused = reparameterize_model(timm.create_model(name, num_classes=5).eval()).state_dict()
    torch.save({'arch': name, 'state_dict': fused} if stated else fused, tmp_path / 'fused.pth')
    with pytest.raises(ValueError, match=r'fused\.pth.*already fused'):
        merge_trained(str(tmp_path / 'fused.pth'), '' if name != 'repvit_m0_9' else name)


def test_weights_that_no_network_computes_with_are_not_converted(trained, tmp_path, capsys):
    trained.stem.conv_1x1.bn.running_var.neg_().sub_(1)
    torch.save({'arch': f'{TINY}_branches', 'state_dict': trained.state_dict()}, tmp_path / 'last.pth.tar')
    save_for_hf(trained, tmp_path / 'repository')
    for source in (tmp_path / 'last.pth.tar', f'local-dir:{tmp_path / "repository"}'):
        assert main(['convert-checkpoint', str(source), '--out', str(tmp_path / 'out')]) == 1
        assert "'stem.conv_1x1.bn.running_var'" in capsys.readouterr().err
        assert not (tmp_path / 'out').exists()
