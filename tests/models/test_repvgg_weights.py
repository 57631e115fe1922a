"""Weights that were trained with branches, from repositories in timm's format."""

import pytest
import timm
import torch
from timm.models import push_to_hf_hub

from repopt_timm import Scales, implied_scales, make_grad_mults, plain_twin, save_pretrained
from repopt_timm.cards.hub import HubError
from repopt_timm.train.command import main as train
from repopt_timm.weights_origin import merged_from

from ..helpers import TINY, tiny_model

REPO = 'timm/mobileone_s0.apple_in1k'
IMAGES = torch.randn(2, 3, 64, 64)
OTHERS = ('fastvit_t8', 'ghostnetv3_100', 'lcnetv2_small', 'repghostnet_050', 'repvit_m0_9')


def trained(model):
    """A few steps, so that no BatchNorm is neutral."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        model.train()(2 * torch.randn(4, 3, 64, 64) + 0.5).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture
def published(hub, client):
    """timm's MobileOne-S0 with its branches, in timm's repository."""
    hub.add_user('timm', 'hf_timm')
    model = trained(timm.create_model('mobileone_s0'))
    client(token='hf_timm')
    push_to_hf_hub(model, REPO, safe_serialization=True)
    client('reader')
    return model


@pytest.fixture
def repvgg(hub, client):
    """A small RepVGG in a repository of its own."""
    model = trained(tiny_model('_branches'))
    push_to_hf_hub(model, 'ann/repvgg', safe_serialization=True)
    return model


def tiny_pretrained(**kwargs):
    overlay = {'hf_hub_id': 'ann/repvgg', 'num_classes': 5}
    return tiny_model(pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def relative(first, second):
    return ((first - second).norm() / second.norm()).item()


def test_a_tag_of_timm_merges_the_branches_of_timms_repository(published, tmp_path):
    model = timm.create_model('repopt_mobileone_s0.apple_in1k', pretrained=True).eval()
    assert relative(model(IMAGES), published(IMAGES)) < 1e-5
    assert 'stem.conv.weight' in model.state_dict()
    tuned = timm.create_model('repopt_mobileone_s0', pretrained=True, scales='implied').eval()
    assert torch.equal(tuned(IMAGES), model(IMAGES))
    assert Scales.from_model(tuned) == implied_scales(published).renamed('mobileone_s0')
    assert len(make_grad_mults(tuned)) == 43
    branches = timm.create_model('repopt_mobileone_s0_branches', pretrained=True).eval()
    assert torch.equal(branches(IMAGES), published(IMAGES))
    save_pretrained(model, tmp_path)
    card = (tmp_path / 'README.md').read_text()
    assert f'branches, as {REPO}; merged into plain kernels' in card
    assert torch.equal(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(IMAGES), model(IMAGES))


@pytest.mark.slow
def test_channels_and_classes_are_adapted_as_timm_does(published):
    model, theirs = (
        timm.create_model(name, pretrained=True, in_chans=1, num_classes=3).eval()
        for name in ('repopt_mobileone_s0', 'mobileone_s0')
    )
    grey = IMAGES[:, :1]
    assert relative(model.forward_features(grey), theirs.forward_features(grey)) < 1e-5
    assert model(grey).shape == (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in OTHERS if timm.is_model(name)])
def test_each_family_merges_timms_weights(name, hub, client):
    hub.add_user('timm', 'hf_timm')
    client(token='hf_timm')
    repo = timm.models.get_pretrained_cfg(name).hf_hub_id
    theirs = trained(timm.create_model(name))
    push_to_hf_hub(theirs, repo, safe_serialization=True)
    model = timm.create_model(f'repopt_{name}', pretrained=True, scales='implied').eval()
    assert relative(model(IMAGES), theirs(IMAGES)) < 1e-5
    assert repo == merged_from(model)
    timm.optim.create_optimizer_v2(model, 'repopt_sgd', lr=0.1)


def test_offline_the_error_names_the_repository(client):
    client(offline=True)
    for name in ('repopt_mobileone_s0', 'repopt_mobileone_s0_branches.apple_in1k'):
        with pytest.raises(HubError, match=f'hf-hub:{REPO}, file model.safetensors is not in the cache'):
            timm.create_model(name, pretrained=True)
    with pytest.raises(HubError, match=r'hf-hub:timm/repvgg_b0\.rvgg_in1k, file .* is not in the cache'):
        timm.create_model('repopt_vgg_b0.rvgg_in1k', pretrained=True)


def test_repvggs_weights_are_merged_into_repopt_vgg(repvgg):
    model = tiny_pretrained().eval()
    assert relative(model(IMAGES), repvgg(IMAGES)) < 1e-5
    assert model.state_dict().keys() == plain_twin(repvgg).state_dict().keys()
    grey = tiny_pretrained(in_chans=1, num_classes=2).eval()
    assert grey(IMAGES[:, :1]).shape == (2, 2)
    tuned = tiny_pretrained(scales='implied').eval()
    assert relative(tuned(IMAGES), repvgg(IMAGES)) < 1e-5
    assert tuned.scales == implied_scales(repvgg).renamed(TINY)
    features = tiny_pretrained(features_only=True).eval()
    torch.testing.assert_close(features(IMAGES)[-1], repvgg.forward_features(IMAGES), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='Use repopt_repvgg_d2se'):
        tiny_pretrained(use_se=True)


def test_each_repvgg_of_timm_is_a_tag_with_timms_settings():
    for name in ('a0', 'b1', 'b3'):
        theirs = timm.models.get_pretrained_cfg(f'repvgg_{name}.rvgg_in1k')
        for kind in ('', '_branches'):
            own = timm.models.get_pretrained_cfg(f'repopt_vgg_{name}{kind}.rvgg_in1k')
            for key in ('hf_hub_id', 'input_size', 'mean', 'std', 'crop_pct', 'interpolation', 'license'):
                assert getattr(own, key) == getattr(theirs, key)
    assert 'repopt_vgg_d2se.rvgg_in1k' not in timm.list_pretrained()
    assert {'repopt_vgg_b3.rvgg_in1k', 'repopt_repvgg_d2se.rvgg_in1k', 'repopt_mobileone_s4.apple_in1k'} <= set(
        timm.list_pretrained()
    )


@pytest.mark.parametrize('name', [TINY, 'repopt_mobileone_s0'])
def test_implied_scales_need_trained_branches(name):
    with pytest.raises(ValueError, match='are read from trained branches'):
        timm.create_model(name, scales='implied')
    state = tiny_model().state_dict()
    overlay = {'state_dict': state, 'num_classes': 5}
    with pytest.raises(ValueError, match='are read from trained branches'):
        tiny_model(pretrained=True, pretrained_cfg_overlay=overlay, scales='implied')


@pytest.mark.slow
@pytest.mark.parametrize('more', [('--scales', 'implied'), ('--opt', 'sgd')], ids=['implied', 'without'])
def test_a_fine_tuned_merge_keeps_its_scales_and_states_its_origin(
    published, images, tmp_path, monkeypatch, capfd, more
):
    monkeypatch.setattr('repopt_timm.train.run_report._draw', lambda *args: False)
    where = [str(images), '--output', str(tmp_path), '--experiment', 'run']
    how = '--model repopt_mobileone_s0 --pretrained --input-size 3 32 32 --batch-size 16'
    how += ' --lr 0.001 --workers 0 --epochs 1 --warmup-epochs 0'
    train([*where, *how.split(), *more])
    assert 'merged without images: its BatchNorm variances are estimates' in capfd.readouterr().err
    save_pretrained(tmp_path / 'run/last.pth.tar', tmp_path / 'saved')
    card = (tmp_path / 'saved/README.md').read_text()
    assert f'branches, as {REPO}; merged into plain kernels; then trained as stated here' in card
    loaded = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True)
    if 'implied' in more:
        scales = Scales.from_model(loaded)
        assert scales == implied_scales(published).renamed('mobileone_s0')
        assert scales.provenance['method'] == 'implied by trained branches'
