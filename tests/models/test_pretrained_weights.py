import json

import pytest
import timm
import torch
from timm.models import save_for_hf

from repopt_timm import save_scales_card
from repopt_timm.models import pretrained_weights as weights

from ..helpers import TINY, random_scales, tiny_model


@pytest.fixture
def repository(tmp_path):
    """A folder in timm's format, with the scales in its card."""
    scales = random_scales()
    model = tiny_model(scales=scales)
    save_for_hf(model, tmp_path, safe_serialization=True)
    save_scales_card(scales, tmp_path)
    return tmp_path, model, scales


def test_a_repositorys_own_scales_come_with_its_model(repository):
    folder, model, scales = repository
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert loaded.scales == scales
    assert torch.equal(loaded.stem.conv.weight, model.stem.conv.weight)
    fresh = timm.create_model(f'local-dir:{folder}')
    assert fresh.scales == scales
    assert not torch.equal(fresh.stem.conv.weight, model.stem.conv.weight)


def test_fine_tuning_keeps_scales_and_weights_with_a_new_head(repository):
    folder, model, scales = repository
    tuned = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=37)
    assert (tuned.num_classes, tuned.scales) == (37, scales)
    assert torch.equal(tuned.stem.conv.weight, model.stem.conv.weight)
    timm.optim.create_optimizer_v2(tuned, 'repopt_sgd', lr=0.1)


def test_scales_in_a_downloaded_config_are_ignored(repository, tmp_path):
    folder, _, scales = repository
    config = json.loads((folder / 'config.json').read_text())
    config.setdefault('model_args', {})['scales'] = str(tmp_path / 'secret.safetensors')
    (folder / 'config.json').write_text(json.dumps(config))
    assert timm.create_model(f'local-dir:{folder}', pretrained=True).scales == scales
    other = random_scales()
    assert timm.create_model(f'local-dir:{folder}', scales=other).scales == other


def test_pretrained_without_weights_says_how_to_get_some():
    with pytest.raises(ValueError, match=r"no trained weights 'repopt_vgg_d2se' here.*hf-hub:user/repo"):
        timm.create_model('repopt_vgg_d2se', pretrained=True)
    with pytest.raises(ValueError, match=r'RepOpt-VGG-L1\*\.pth .*convert-checkpoint FILE --out DIR'):
        timm.create_model('repopt_vgg_l1.in1k', pretrained=True)


def test_only_weights_that_can_be_had_are_listed(monkeypatch):
    listed = [name for name in timm.list_pretrained('*repopt_vgg*') if not name.endswith('.rvgg_in1k')]
    assert listed == [name for name in weights.tagged_cfgs() if 'file' in weights.tagged_cfgs()[name]]
    monkeypatch.setattr(weights, 'HUB_NAMESPACE', 'someone')
    assert weights.tagged_cfgs()['repopt_vgg_b1.in1k']['hf_hub_id'] == 'someone/repopt_vgg_b1.in1k'


def test_the_shipped_tag_is_what_pretrained_means(tmp_path, monkeypatch, repository):
    folder, _, _ = repository
    cfg = {'file': str(folder / 'model.safetensors'), 'num_classes': 5, 'tag': 'digits'}
    found = timm.models.PretrainedCfg(**cfg)
    monkeypatch.setattr(weights, 'get_arch_pretrained_cfgs', lambda variant: {f'{TINY}.digits': found})
    assert weights.choose_weights(TINY, True, None, None) == 'digits'
    assert weights.choose_weights(TINY, False, None, None) is None
    monkeypatch.undo()
    assert weights.choose_weights('repopt_vgg_b1', True, None, None) == 'cifar10'
    assert weights.choose_weights('repopt_vgg_b3', True, None, None) == 'rvgg_in1k'
