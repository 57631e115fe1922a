import argparse
import json
import re

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from timm.models import _hub

from repopt_timm import Scales, load_scales, prepare, push_scales, push_to_hub, register_twins, save_pretrained
from repopt_timm.cards.repository import save_scales_card
from repopt_timm.cli import main
from repopt_timm.model_size import count_macs, count_parameters
from repopt_timm.optim import build_repopt_sgd
from repopt_timm.reparam import kind_of

from .helpers import TINY, card_of, random_scales, read_tree, tiny_model

REPO = 'ann/tiny'
TREE = {'README.md', 'config.json', 'model.safetensors', 'scales.png'}
# timm before 1.0.31 does not record what a model was created with.
records_arguments = pytest.mark.skipif(
    not hasattr(_hub, 'get_model_args'), reason='before 1.0.31 timm does not record img_size'
)
HISTORY = [{'epoch': epoch, 'train_loss': 1.0, 'eval_top1': 91.25, 'eval_top5': 99.5} for epoch in range(3)]


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32)


def trained(kind='', **kwargs):
    """A model with statistics and weights as training leaves them."""
    model = tiny_model(kind, scales=random_scales(strides=kwargs.get('strides', (2,) * 5)), **kwargs)
    model(torch.randn(8, kwargs.get('in_chans', 3), 32, 32))
    return model.eval()


def checkpoint_of(model, path, content=(), **args):
    """A checkpoint as the training command writes it."""
    target = kind_of(model) == 'target'
    content = {
        'arch': model.pretrained_cfg['architecture'],
        'state_dict': model.state_dict(),
        'epoch': 2,
        'optimizer': build_repopt_sgd(model, Scales.from_model(model), lr=0.1).state_dict() if target else {},
        'args': argparse.Namespace(model_kwargs={}, **args),
        'history': HISTORY,
        **dict(content),
    }
    torch.save(content, path)
    return path


def load(folder):
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


def test_what_is_saved_is_what_is_pushed_and_loads_from_both(hub, client, images, tmp_path):
    model, metrics = trained(strides=(1, 2, 2, 2, 2)), {'dataset': 'digits', 'top1': 97.5}
    for _ in range(2):
        save_pretrained(model, tmp_path / 'local', metrics=metrics, repo_id=REPO)
    tree = read_tree(tmp_path / 'local')
    assert set(tree) == TREE and b'scales' not in tree['config.json']
    assert len({file.stat().st_mode for file in (tmp_path / 'local').iterdir()}) == 1
    push_to_hub(model, REPO, metrics=metrics)
    assert {name: hub.repos[REPO].files()[name] for name in tree} == tree
    assert torch.equal(load(tmp_path / 'local')(images), model(images))
    for offline in (False, True):
        client('other', token=None, offline=offline)
        pulled = timm.create_model(f'hf-hub:{REPO}', pretrained=True).eval()
        assert torch.equal(pulled(images), model(images))
        assert (pulled.strides, pulled.num_classes) == ((1, 2, 2, 2, 2), 5)
        assert Scales.from_model(pulled) == Scales.from_model(model)


def test_a_card_shows_results_and_training_and_leads_with_what_people_choose_by(tmp_path):
    save_pretrained(trained(), tmp_path, metrics={'top1': 97.5}, training={'dataset': 'hfds/ann/digits', 'epochs': 3})
    card = card_of(tmp_path)
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ('hfds/ann/digits', 'accuracy', 97.5)
    # The Hub takes names with at most one slash.
    assert (card.data.library_name, card.data.datasets, result.dataset_type) == ('timm', ['ann/digits'], 'ann/digits')
    lead, _, rest = card.text.partition('## Usage')
    assert '| Top-1 accuracy, hfds/ann/digits | 97.5 % |' in lead
    assert '| epochs | 3 |' in rest and '| image size | 3 x 224 x 224 |' in rest
    # New scales are beside the same weights.
    save_scales_card(random_scales(), tmp_path)
    assert card_of(tmp_path).text.startswith(lead)


def test_multiply_adds_are_those_of_the_convolutions():
    assert count_macs(torch.nn.Conv2d(3, 8, 3, padding=1), (3, 4, 4)) == 3 * 8 * 9 * 16


def test_a_card_states_the_data_of_its_weights_and_keeps_a_name_that_somebody_wrote(tmp_path):
    names = {
        'pytorch/photos': 'pytorch/photos',
        'hfds/ann/My photos (2024)/': 'ann/My-photos-2024',
        'a--b..v1.0': 'a-b-v1.0',
    }
    for name, expected in names.items():
        save_pretrained(trained(), tmp_path, training={'dataset': name})
        assert card_of(tmp_path).data.datasets == [expected]
    card = card_of(tmp_path)
    card.data.datasets = ['ann/other']
    card.save(tmp_path / 'README.md')
    save_pretrained(trained(), tmp_path, training={'dataset': 'digits'})
    assert card_of(tmp_path).data.datasets == ['ann/other']
    save_pretrained(trained(), tmp_path / 'new', training={'dataset': '写真'}, metrics={'top1': 50.0})
    assert card_of(tmp_path / 'new').data.datasets is None


@pytest.mark.parametrize(
    ('name', 'kwargs', 'size'),
    [
        (TINY, {'in_chans': 1}, '1 x 224 x 224'),
        pytest.param('vit_tiny_patch16_224', {'img_size': 64}, '3 x 64 x 64', marks=records_arguments),
    ],
)
def test_a_card_states_the_size_of_images_that_the_model_was_created_for(name, kwargs, size, tmp_path):
    save_pretrained(timm.create_model(name, **kwargs), tmp_path)
    text = card_of(tmp_path).text
    assert f'| image size | {size} |' in text and '| multiply adds |' in text


def test_the_commands_push_weights_and_scales(hub, client, tmp_path):
    path = checkpoint_of(trained('_hs'), tmp_path / 'last.pth.tar', dataset='digits')
    assert main(['push', str(path), REPO]) == main(['scales', 'push', str(path), 'ann/scales']) == 0
    assert 'model.safetensors' in hub.repos[REPO].files() and 'model.safetensors' not in hub.repos['ann/scales'].files()
    found = [load_scales(source, tiny_model()) for source in (f'hf-hub:{REPO}', 'hf-hub:ann/scales', path)]
    assert found[0] == found[1] == found[2]


def test_other_weights_do_not_take_over_accuracy_and_curves(hub, client, tmp_path):
    path, saved = checkpoint_of(trained('_hs'), tmp_path / 'last.pth.tar', dataset='digits'), tmp_path / 'saved'
    for weights in (path, trained()):
        save_pretrained(weights, saved)
        push_to_hub(weights, REPO)
        push_scales(random_scales(), REPO)
        for card in (card_of(saved), ModelCard.load(REPO)):
            assert bool(card.data.eval_results) == ('(curves.png)' in card.text) == (weights is path)
        assert (saved / 'curves.png').exists() == (weights is path)


@pytest.mark.parametrize('scales_file', [False, True])
def test_new_weights_without_scales_do_not_take_over_the_scales_of_old_ones(hub, client, tmp_path, scales_file):
    saved = tmp_path / 'saved'
    for weights in (trained(), tiny_model().eval()):
        save_pretrained(weights, saved, scales_file=scales_file)
        push_to_hub(weights, REPO, scales_file=scales_file)
    for card in (card_of(saved), ModelCard.load(REPO)):
        assert 'repopt' not in card.data and 'cales that' not in card.text and 'scales.png' not in card.text
    assert set(read_tree(saved)) == TREE - {'scales.png'}


def test_a_card_says_what_its_reader_has_to_fill_in_and_to_build(tmp_path):
    model = timm.create_model('repopt_mobileone_s0', num_classes=5, strides=(1, 1, 2, 2, 2), scales='initial')
    training = {'seed': 12345, 'parameters': 1}
    for repo_id in (None, REPO):
        save_pretrained(model, tmp_path, training=training, repo_id=repo_id)
        text = card_of(tmp_path).text
        assert ('`USER`' in text) == (repo_id is None)
        assert '| seed | 12345 |' in text and f'| parameters | {count_parameters(model):,} |' in text
        assert 'stages.1.0.conv, stages.2.0.conv, stages.3.0.conv' in text


def snippets(folder, **names):
    """Runs the Python blocks of a card, with the repository read from its folder; yields their variables."""
    text = (folder / 'README.md').read_text().replace(f'hf-hub:USER/{folder.name}', f'local-dir:{folder}')
    for code in re.findall(r'```python\n(.+?)```', text, re.DOTALL):
        found = dict(names)
        exec(re.sub(r"(load_scales\(|scales=)'local-dir:", r"\1'", code).replace('= ...', '= given'), found)
        yield found


def test_the_snippets_of_a_card_run(tmp_path, monkeypatch, capsys):
    model = trained(in_chans=1, strides=(1, 2, 2, 2, 2))
    cfg = {'input_size': (1, 32, 32), 'mean': (0.5,), 'std': (0.25,), 'num_classes': 5, 'label_names': list('abcde')}
    model.pretrained_cfg |= cfg
    save_pretrained(model, tmp_path)
    Image.new('L', (40, 30)).save(tmp_path / 'image.jpg')
    monkeypatch.chdir(tmp_path)
    _, *trainings = snippets(tmp_path)
    assert sorted(line[0] for line in capsys.readouterr().out.splitlines()) == list('abcde')
    assert [type(found['optimizer']).__name__ for found in trainings] == ['RepOptSGD'] * 2


def test_the_snippets_for_networks_of_timms_and_for_others_run(tmp_path, monkeypatch):
    Image.new('RGB', (40, 30)).save(tmp_path / 'image.jpg')
    monkeypatch.chdir(tmp_path)
    model = timm.create_model('test_resnet', num_classes=5)
    save_pretrained(prepare(model, Scales.initial(model)), tmp_path / 'resnet')
    assert [type(found['optimizer']).__name__ for found in [*snippets(tmp_path / 'resnet')][1:]] == ['RepOptSGD'] * 2
    unknown = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1))
    save_scales_card(Scales.initial(unknown), tmp_path / 'unknown')
    loading, training = snippets(tmp_path / 'unknown', given=unknown)
    assert loading['scales'] == Scales.from_model(training['model']) == Scales.initial(unknown)
    # Arguments of its own: from config.json beside weights, else from the provenance.
    register_twins('resnet18')
    own = timm.create_model('repopt_resnet18', num_classes=5, channels=(8, 8, 8, 16), scales='initial')
    save_pretrained(own, tmp_path / 'own')
    foreign = {'print(1)': 2, 'class': 3, 'num_classes': 4, 'scales': 'x', 'pretrained_cfg': 5}
    searched = Scales.from_model(own, {'model_kwargs': {'channels': [8, 8, 8, 16], **foreign}})
    save_scales_card(searched, tmp_path / 'searched')
    for folder in ('own', 'searched'):
        _, training, *_ = snippets(tmp_path / folder)
        assert Scales.from_model(training['model']) == searched
    # An optimizer of ours refuses a model with branches.
    save_pretrained(trained('_csla'), tmp_path / 'csla')
    *_, tuning = snippets(tmp_path / 'csla')
    assert type(tuning['optimizer']) is torch.optim.SGD


def test_a_checkpoint_becomes_a_repository(images, tmp_path):
    model, saved = trained(in_chans=1), tmp_path / 'saved'
    args = {'data_dir': '/somewhere/digits', 'in_chans': 1, 'input_size': [1, 32, 32], 'mean': [0.5], 'seed': 0}
    args |= {'batch_size': 8, 'world_size': 4, 'grad_accum_steps': 2}
    path = checkpoint_of(model, tmp_path / 'last.pth.tar', {'versions': {'torch': '2.6.0'}}, **args)
    with pytest.raises(ValueError, match='folder of a run'):
        save_pretrained(tmp_path, tmp_path, scales=Scales.from_model(model))
    save_pretrained(tmp_path, saved, scales=Scales.from_model(model), training={'note': 'of mine'})
    assert 'of mine' in card_of(saved).text and card_of(saved).data.eval_results[0].metric_value == 91.25
    save_pretrained(path, saved, scales=Scales.from_model(model))
    loaded = load(saved)
    assert torch.equal(loaded(images[:, :1]), model(images[:, :1]))
    assert [tuple(loaded.pretrained_cfg[key]) for key in ('input_size', 'mean')] == [(1, 32, 32), (0.5,)]
    card = card_of(saved)
    results = {(each.dataset_name, each.metric_name): each.metric_value for each in card.data.eval_results}
    assert results == {('digits', 'Top-1 accuracy'): 91.25, ('digits', 'Top-5 accuracy'): 99.5}
    assert '/somewhere' not in card.text
    for fact in ('| seed | 0 |', '| batch size | 64 |', '| epochs | 3 |', '| versions | torch 2.6.0 |'):
        assert fact in card.text


def test_a_network_without_scales_goes_without_and_states_no_tag_and_no_test_size_of_other_weights(tmp_path):
    model = timm.create_model('resnet18', num_classes=5).eval()
    content = {'arch': 'resnet18', 'state_dict': model.state_dict(), 'args': argparse.Namespace(data_dir='digits')}
    torch.save(content, tmp_path / 'last.pth.tar')
    save_pretrained(tmp_path / 'last.pth.tar', tmp_path / 'saved')
    assert set(read_tree(tmp_path / 'saved')) == TREE - {'scales.png'}
    cfg = json.loads((tmp_path / 'saved/config.json').read_text())['pretrained_cfg']
    assert not {'tag', 'test_input_size', 'test_crop_pct'} & cfg.keys()


def test_weights_are_saved_in_fewer_bits_and_restored_on_load(tmp_path, images):
    model, packed = trained(), tmp_path / 'packed'
    path = checkpoint_of(model, tmp_path / 'last.pth.tar', dataset='digits')
    save_pretrained(path, packed, scales=Scales.from_model(model), precision='int8')
    size = sum(4 * tensor.numel() for tensor in model.state_dict().values())
    assert (packed / 'model.safetensors').stat().st_size < 0.35 * size
    torch.testing.assert_close(load(packed)(images), model(images), rtol=0.05, atol=0.05)
    card = card_of(packed)
    # The accuracy of the run is not that of weights in 8 bits.
    assert '| weights | int8 |' in card.text and '| top1 before rounding | 91.25 |' in card.text
    assert card.data.eval_results is None


def test_what_cannot_be_published_is_refused_before_anything_is_made(hub, client, shard, tmp_path):
    model, damaged = trained(), trained()
    torch.save(model.state_dict(), tmp_path / 'bare.pth')
    damaged.stem.bn.running_var[0] = -1
    path = checkpoint_of(damaged, tmp_path / 'last.pth.tar', dataset='digits')
    other = checkpoint_of(model, tmp_path / 'other.pth', {'history': [{'eval_top1': 'high'}]})
    for source, given, named in (
        (model, {'metrics': {'top1': 97.5}}, 'dataset'),
        (model, {'metrics': {'dataset': 'digits', 'top1': float('nan')}}, 'top1'),
        (model, {'training': {'lr': float('inf')}}, 'training'),
        (timm.create_model('test_byobnet'), {'precision': 'int8'}, 'test_byobnet'),
        (tmp_path / 'bare.pth', {}, r'bare\.pth.*name its model'),
        (shard(trained()), {}, 'sharded'),
        (model, {'scales': random_scales()}, 'scales'),
        (tiny_model(features_only=True), {}, 'FeatureListNet'),
        (damaged, {}, rf"{TINY}: 'stem\.bn\.running_var'"),
        (path, {'scales': Scales.from_model(model)}, r"last\.pth\.tar: 'stem\.bn\.running_var'"),
        (other, {'scales': random_scales()}, r'other\.pth: .*scales'),
        (other, {'scales': Scales.from_model(model)}, r'other\.pth'),
    ):
        with pytest.raises(ValueError, match=named):
            push_to_hub(source, REPO, **given)
        with pytest.raises(ValueError, match=named):
            save_pretrained(source, tmp_path / 'out', **given)
    assert not hub.requests and not (tmp_path / 'out').exists()


def test_wrapped_compiled_and_tied_parts_are_saved_under_the_names_of_the_plain_network(tmp_path):
    model = trained()
    scales = Scales.from_model(model)
    model.stages[1][1].bn.weight = model.stages[1][0].bn.weight
    save_pretrained(model, tmp_path / 'plain')
    model.stages = torch.compile(model.stages)
    prepare(model, scales, init=False)
    wrapped = torch.nn.DataParallel(torch.compile(model.to(memory_format=torch.channels_last)))
    save_pretrained(wrapped, tmp_path / 'wrapped', repo_id='USER/plain')
    assert read_tree(tmp_path / 'wrapped') == read_tree(tmp_path / 'plain')
    assert Scales.from_model(load(tmp_path / 'plain')) == scales
