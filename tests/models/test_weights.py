"""Weights and scales from repositories in timm's format, of the model itself or of its branches."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import push_to_hf_hub, save_for_hf

from repopt_timm import Scales, implied_scales, load_scales, make_grad_mults, plain_twin, report_twin, save_pretrained
from repopt_timm.cards.hub import HubError
from repopt_timm.cards.repository import save_scales_card
from repopt_timm.models.weights import choose_weights
from repopt_timm.sources import shipped_repositories
from repopt_timm.train.command import main as train
from repopt_timm.weights_origin import merged_from

from ..blocks.block_examples import randomized
from ..helpers import TINY, random_scales, tiny_model

REPO = 'timm/mobileone_s0.apple_in1k'
IMAGES = torch.randn(2, 3, 64, 64)
# The smallest of each family with weights, and the number of its blocks that become plain.
FAMILIES = {
    'fastvit_t8': 10,
    'ghostnetv3_100': 36,
    'lcnetv2_small': 6,
    'mobileone_s0': 43,
    'repghostnet_050': 32,
    'repvit_m0_9': 23,
    'repvit_m1': 23,
}


@pytest.fixture
def publish(hub, client):
    """Publishes a trained network of timm, with its branches, in timm's repository."""

    def push(name, repo):
        hub.users['hf_timm'] = 'timm'
        model = randomized(timm.create_model(name))
        client(token='hf_timm')
        push_to_hf_hub(model, repo, safe_serialization=True)
        client('reader')
        return model

    return push


@pytest.fixture
def repository(tmp_path):
    """A folder in timm's format, with the scales in its card."""
    scales = random_scales()
    model = tiny_model(scales=scales)
    save_for_hf(model, tmp_path, safe_serialization=True)
    save_scales_card(scales, tmp_path)
    return tmp_path, model, scales


def relative(first, second):
    return ((first - second).norm() / second.norm()).item()


def test_a_repositorys_own_scales_come_with_its_model(repository):
    folder, model, scales = repository
    tuned = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=37)
    assert (tuned.num_classes, Scales.from_model(tuned)) == (37, scales)
    assert torch.equal(tuned.stem.conv.weight, model.stem.conv.weight)
    fresh = timm.create_model(f'local-dir:{folder}')
    assert Scales.from_model(fresh) == scales
    assert not torch.equal(fresh.stem.conv.weight, model.stem.conv.weight)


def test_scales_in_a_downloaded_config_are_ignored(repository, tmp_path):
    folder, _, scales = repository
    config = json.loads((folder / 'config.json').read_text())
    config.setdefault('model_args', {})['scales'] = str(tmp_path / 'secret.safetensors')
    (folder / 'config.json').write_text(json.dumps(config))
    assert Scales.from_model(timm.create_model(f'local-dir:{folder}', pretrained=True)) == scales
    other = random_scales()
    assert Scales.from_model(timm.create_model(f'local-dir:{folder}', scales=other)) == other


def test_pretrained_without_weights_says_how_to_get_some():
    with pytest.raises(ValueError, match=r'repopt_vgg_d2se.*hf-hub:user/repo'):
        timm.create_model('repopt_vgg_d2se', pretrained=True)


def test_what_ships_loads_offline_with_its_scales(client):
    client(offline=True)
    model = timm.create_model('repopt_vgg_a0.cifar10', pretrained=True)
    file = load_file(shipped_repositories()['repopt_vgg_a0.cifar10'] / 'model.safetensors')
    assert torch.equal(model.stages[2][3].conv.weight, file['stages.2.3.conv.weight'].float())
    assert (model.num_classes, Scales.from_model(model)) == (10, load_scales('repopt_vgg_a0.cifar10'))
    assert model.eval().forward_features(torch.zeros(1, 3, 32, 32)).shape[2:] == model.pretrained_cfg['pool_size']


@pytest.mark.parametrize(('name', 'tag'), [('repopt_vgg_b1', 'cifar10'), ('repopt_vgg_b3', 'rvgg_in1k')])
def test_what_ships_comes_before_what_timm_has(name, tag):
    assert choose_weights(name, True, None, None).tag == tag
    assert not choose_weights(name, False, None, None).has_weights


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in FAMILIES if timm.is_model(name)])
def test_each_family_merges_timms_weights(name, publish):
    repo = timm.models.get_pretrained_cfg(name).hf_hub_id
    theirs = publish(name, repo)
    model = timm.create_model(f'repopt_{name}', pretrained=True, scales='implied').eval()
    assert sum(bool(row.branches) for row in report_twin(theirs)) == FAMILIES[name]
    assert relative(model(IMAGES), theirs(IMAGES)) < 1e-5
    assert merged_from(model) == repo
    assert Scales.from_model(model) == implied_scales(theirs).renamed(name)
    timm.optim.create_optimizer_v2(model, 'repopt_sgd', lr=0.1)


@pytest.mark.parametrize(
    ('name', 'repo'),
    [('repopt_mobileone_s0_branches.apple_in1k', REPO), ('repopt_vgg_b0.rvgg_in1k', 'timm/repvgg_b0.rvgg_in1k')],
)
def test_offline_the_error_names_the_repository(client, name, repo):
    client(offline=True)
    with pytest.raises(HubError, match=repo):
        timm.create_model(name, pretrained=True)


def test_repvggs_weights_are_merged_into_repopt_vgg(hub, client, tmp_path):
    repvgg = randomized(tiny_model('_branches'))
    push_to_hf_hub(repvgg, 'ann/repvgg', safe_serialization=True)

    def pretrained(**kwargs):
        overlay = {'hf_hub_id': 'ann/repvgg', 'num_classes': 5}
        return tiny_model(pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()

    model = pretrained()
    assert relative(model(IMAGES), repvgg(IMAGES)) < 1e-5
    assert model.state_dict().keys() == plain_twin(repvgg).state_dict().keys()
    assert pretrained(in_chans=1, num_classes=2)(IMAGES[:, :1]).shape == (2, 2)
    tuned = pretrained(scales='implied')
    assert torch.equal(tuned(IMAGES), model(IMAGES))
    assert Scales.from_model(tuned) == implied_scales(repvgg).renamed(TINY)
    assert len(make_grad_mults(tuned)) == 7
    features = pretrained(features_only=True)
    torch.testing.assert_close(features(IMAGES)[-1], repvgg.forward_features(IMAGES), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='Use repopt_repvgg_d2se'):
        pretrained(use_se=True)
    save_pretrained(model, tmp_path / 'saved')
    assert 'branches, as ann/repvgg; merged into plain kernels' in (tmp_path / 'saved/README.md').read_text()


def test_each_repvgg_of_timm_is_a_tag_with_timms_settings():
    cfgs = [f'{name}.rvgg_in1k' for name in ('repvgg_b3', 'repopt_vgg_b3', 'repopt_vgg_b3_branches')]
    theirs, *ours = [timm.models.get_pretrained_cfg(cfg).to_dict() for cfg in cfgs]
    for own in ours:
        for key in ('hf_hub_id', 'input_size', 'mean', 'std', 'crop_pct', 'interpolation', 'license'):
            assert own[key] == theirs[key]
    listed = set(timm.list_pretrained())
    assert 'repopt_vgg_d2se.rvgg_in1k' not in listed
    assert {'repopt_vgg_b3.rvgg_in1k', 'repopt_repvgg_d2se.rvgg_in1k', 'repopt_mobileone_s4.apple_in1k'} <= listed


@pytest.mark.slow
def test_a_fine_tuned_merge_keeps_its_scales_and_states_its_origin(publish, images, tmp_path, capfd):
    published = publish('mobileone_s0', REPO)
    where = [str(images), '--output', str(tmp_path), '--experiment', 'run']
    how = '--model repopt_mobileone_s0 --pretrained --input-size 3 32 32 --batch-size 16'
    how += ' --lr 0.001 --workers 0 --epochs 1 --warmup-epochs 0 --scales implied'
    train([*where, *how.split()])
    assert 'merged without images: its BatchNorm variances are estimates' in capfd.readouterr().err
    save_pretrained(tmp_path / 'run/last.pth.tar', tmp_path / 'saved')
    card = (tmp_path / 'saved/README.md').read_text()
    assert f'branches, as {REPO}; merged into plain kernels; then trained as stated here' in card
    loaded = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True)
    assert Scales.from_model(loaded) == implied_scales(published).renamed('mobileone_s0')
