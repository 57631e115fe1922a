import argparse
import json
import re

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from timm.models import save_for_hf

from repopt_timm import Scales, load_scales, prepare, push_scales, push_to_hub, save_pretrained
from repopt_timm.cards.publish import save_scales_card
from repopt_timm.optim import build_repopt_sgd
from repopt_timm.reparam import kind_of

from .helpers import TINY, card_of, random_scales, read_tree, tiny_model

REPO = 'ann/tiny'
TREE = {'README.md', 'config.json', 'model.safetensors', 'scales.png'}


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
    torch.save(
        {
            'arch': model.pretrained_cfg['architecture'],
            'state_dict': model.state_dict(),
            'epoch': 2,
            'optimizer': build_repopt_sgd(model, model.scales, lr=0.1).state_dict() if target else {},
            'args': argparse.Namespace(model_kwargs={}, **args),
            'history': [{'epoch': 2, 'eval_top1': 91.25, 'eval_top5': 99.5}],
            **dict(content),
        },
        path,
    )
    return path


def load(folder):
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


@pytest.mark.parametrize('kind', ['', '_hs'])
def test_what_is_saved_is_what_is_pushed_and_loads_from_both(hub, client, images, tmp_path, kind):
    model, metrics = trained(kind, strides=(1, 2, 2, 2, 2)), {'dataset': 'digits', 'top1': 97.5}
    for _ in range(2):
        save_pretrained(model, tmp_path / 'local', metrics=metrics, repo_id=REPO)
    tree = read_tree(tmp_path / 'local')
    assert set(tree) == TREE
    push_to_hub(model, REPO, metrics=metrics)
    assert {name: hub.repo(REPO).read(name) for name in tree} == tree
    assert torch.equal(load(tmp_path / 'local')(images), model(images))
    for offline in (False, True):
        client('other', token=None, offline=offline)
        pulled = timm.create_model(f'hf-hub:{REPO}', pretrained=True).eval()
        assert torch.equal(pulled(images), model(images))
        assert (pulled.strides, pulled.num_classes) == ((1, 2, 2, 2, 2), 5)
        assert load_scales(f'hf-hub:{REPO}') == model.scales


def test_a_card_shows_results_and_training_and_leads_with_what_people_choose_by(tmp_path):
    training = {'dataset': 'hfds/ann/digits', 'epochs': 3}
    save_pretrained(trained(), tmp_path, metrics={'top1': 97.5}, training=training)
    card = card_of(tmp_path)
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ('hfds/ann/digits', 'accuracy', 97.5)
    assert (card.data.library_name, card.data.datasets) == ('timm', ['ann/digits'])
    lead, _, rest = card.text.partition('## Usage')
    assert '| Top-1 accuracy, hfds/ann/digits | image size | parameters | multiply adds |' in lead
    assert '| 97.50 % | 3 x 224 x 224 | 0.1 M | ' in lead
    assert '| epochs | 3 |' in rest and 'multiply adds' not in rest
    # New scales are beside the same weights.
    save_scales_card(random_scales(), tmp_path)
    assert card_of(tmp_path).text.startswith(lead)
    assert card_of(tmp_path).data.eval_results == [result]


def test_other_weights_do_not_take_over_accuracy_and_curves(hub, client, tmp_path):
    history = [{'epoch': 0, 'train_loss': 1.0, 'eval_top1': 90, 'eval_top5': 99.5}]
    path = checkpoint_of(trained('_hs'), tmp_path / 'last.pth.tar', {'history': history}, dataset='digits')
    saved = tmp_path / 'saved'
    save_pretrained(path, saved)
    push_to_hub(path, REPO)
    push_scales(random_scales(), REPO)
    assert hub.repo(REPO).read('curves.png').startswith(b'\x89PNG')
    for card in (card_of(saved), ModelCard.load(REPO)):
        assert card.data.eval_results and '(curves.png)' in card.text
    save_pretrained(trained(), saved)
    push_to_hub(trained(), REPO)
    for card in (card_of(saved), ModelCard.load(REPO)):
        assert not card.data.eval_results and '(curves.png)' not in card.text
    assert not (saved / 'curves.png').exists()


def snippets(folder):
    """The Python blocks of a card, with the repository read from its folder."""
    text = (folder / 'README.md').read_text().replace(f'hf-hub:USER/{folder.name}', f'local-dir:{folder}')
    return re.findall(r'```python\n(.+?)```', text, re.DOTALL)


def run(snippet, **names):
    code = re.sub(r"(load_scales\(|scales=)'local-dir:", r"\1'", snippet).replace('= ...', '= given')
    exec(code, names)
    return names


@pytest.mark.parametrize('channels', [1, 3])
def test_the_snippets_of_a_card_run(channels, tmp_path, monkeypatch, capsys):
    model = trained(in_chans=channels, strides=(1, 2, 2, 2, 2))
    model.pretrained_cfg |= {
        'input_size': (channels, 32, 32),
        'mean': (0.5,) * channels,
        'std': (0.25,) * channels,
        'num_classes': 5,
        'label_names': list('abcde'),
    }
    save_pretrained(model, tmp_path)
    Image.new('L', (40, 30)).save(tmp_path / 'image.jpg')
    monkeypatch.chdir(tmp_path)
    classify, train, tune = snippets(tmp_path)
    run(classify)
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line[0] for line in lines) == list('abcde')
    assert sum(float(line[3:-1]) for line in lines) == pytest.approx(100, abs=0.3)
    for snippet in (train, tune):
        assert type(run(snippet)['optimizer']).__name__ == 'RepOptSGD'


def test_snippets_of_scales_of_networks_of_timms_and_of_others_run(tmp_path):
    model = timm.create_model('test_resnet', num_classes=5)
    save_pretrained(prepare(model, Scales.initial(model)), tmp_path)
    _, train, tune = snippets(tmp_path)
    for snippet in (train, tune):
        assert type(run(snippet)['optimizer']).__name__ == 'RepOptSGD'
    unknown = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1))
    save_scales_card(Scales.initial(unknown), tmp_path / 'unknown')
    first, train, search = snippets(tmp_path / 'unknown')
    assert run(first)['scales'] == Scales.initial(unknown)
    run(train, given=unknown)
    assert kind_of(run(search, given=unknown)['search']) == 'hs'


@pytest.mark.parametrize('kind', ['_hs', '_csla'])
def test_a_card_of_a_model_with_branches_offers_no_optimizer_that_refuses_it(tmp_path, kind):
    save_pretrained(trained(kind), tmp_path)
    text = card_of(tmp_path).text
    assert 'multi-branch' in text.partition('## Usage')[0]
    assert "'sgd'" in text.partition('Fine-tune:')[2].partition('##')[0]


def test_a_checkpoint_becomes_a_repository(images, tmp_path):
    model = trained(in_chans=1)
    history = [{'epoch': epoch, 'train_loss': 1.0, 'eval_top1': 90, 'eval_top5': 99.5} for epoch in range(3)]
    path = checkpoint_of(
        model,
        tmp_path / 'last.pth.tar',
        {'history': history, 'versions': {'torch': '2.6.0'}},
        data_dir='/somewhere/digits',
        in_chans=1,
        input_size=[1, 32, 32],
        mean=[0.5],
        seed=0,
        batch_size=8,
        world_size=4,
        grad_accum_steps=2,
    )
    for scales in (None, random_scales()):
        with pytest.raises(ValueError, match=r'last\.pth\.tar: .*scales'):
            save_pretrained(path, tmp_path / 'local', scales=scales)
    save_pretrained(path, tmp_path / 'local', scales=model.scales)
    loaded = load(tmp_path / 'local')
    assert torch.equal(loaded(images[:, :1]), model(images[:, :1]))
    assert tuple(loaded.pretrained_cfg['input_size']) == (1, 32, 32)
    assert tuple(loaded.pretrained_cfg['mean']) == (0.5,)
    card = card_of(tmp_path / 'local')
    results = {(each.dataset_name, each.metric_name): each.metric_value for each in card.data.eval_results}
    assert results == {('digits', 'Top-1 accuracy'): 90, ('digits', 'Top-5 accuracy'): 99.5}
    assert '/somewhere' not in card.text
    for fact in ('| seed | 0 |', '| batch size | 64 |', '| epochs | 3 |', '| versions | torch 2.6.0 |'):
        assert fact in card.text
    assert Image.open(tmp_path / 'local' / 'curves.png').width > 500
    # The checkpoint of a search has its scales.
    search = trained('_hs')
    save_pretrained(checkpoint_of(search, path, dataset='digits'), tmp_path / 'search')
    assert load_scales(tmp_path / 'search') == search.scales


def test_a_card_does_not_name_the_tag_of_other_weights(tmp_path):
    model = timm.create_model('test_byobnet', num_classes=5).eval()
    content = {'arch': 'test_byobnet', 'state_dict': model.state_dict()}
    torch.save({**content, 'args': argparse.Namespace(data_dir='digits')}, tmp_path / 'last.pth.tar')
    save_pretrained(tmp_path / 'last.pth.tar', tmp_path / 'saved')
    text = card_of(tmp_path / 'saved').text
    assert 'Weights of `test_byobnet` for [timm](https://github.com/huggingface/pytorch-image-models).\n' in text
    assert 'tag' not in json.loads((tmp_path / 'saved' / 'config.json').read_text())['pretrained_cfg']


@pytest.mark.parametrize(('precision', 'part'), [('float16', 0.55), ('int8', 0.35)])
def test_weights_are_saved_in_fewer_bits_and_restored_on_load(precision, part, tmp_path, images):
    model = trained()
    path = checkpoint_of(model, tmp_path / 'last.pth.tar', dataset='digits')
    save_pretrained(path, tmp_path / 'whole', scales=model.scales)
    save_pretrained(path, tmp_path / 'packed', scales=model.scales, precision=precision)
    sizes = [(tmp_path / name / 'model.safetensors').stat().st_size for name in ('whole', 'packed')]
    assert sizes[1] < part * sizes[0]
    loaded = load(tmp_path / 'packed')
    assert loaded.stem.conv.weight.dtype == torch.float32
    torch.testing.assert_close(loaded(images), model(images), rtol=0.05, atol=0.05)
    assert not torch.equal(loaded(images), model(images))
    card = card_of(tmp_path / 'packed')
    assert f'| weights | {precision} |' in card.text
    # The accuracy of the run is not that of weights in 8 bits.
    assert ('| top1 before rounding | 91.25 |' in card.text) == (precision == 'int8')
    assert (card.data.eval_results is None) == (precision == 'int8')


def test_a_model_without_scales_goes_without(tmp_path):
    save_pretrained(tiny_model(), tmp_path)
    assert set(read_tree(tmp_path)) == TREE - {'scales.png'}
    with pytest.raises(ValueError, match=r'README\.md'):
        load_scales(tmp_path)


def test_what_cannot_be_published_is_refused_before_anything_is_made(hub, client, shard, tmp_path):
    model = trained()
    torch.save(model.state_dict(), tmp_path / 'bare.pth')
    damaged = trained()
    with torch.no_grad():
        damaged.stem.bn.running_var[0] = -1
    path = checkpoint_of(damaged, tmp_path / 'last.pth.tar', dataset='digits')
    for source, given, named in (
        (model, {'metrics': {'top1': 97.5}}, 'dataset'),
        (model, {'metrics': {'dataset': 'digits', 'top1': float('nan')}}, 'top1'),
        (model, {'training': {'lr': float('inf')}}, 'training'),
        (model, {'precision': 'int4'}, 'int4'),
        (timm.create_model('test_byobnet'), {'precision': 'int8'}, 'test_byobnet'),
        (tmp_path / 'bare.pth', {}, r'bare\.pth.*name its model'),
        (shard(trained()), {}, 'sharded'),
        (model, {'scales': random_scales()}, 'scales'),
        (model, {'scales': Scales.initial(timm.create_model('repopt_vgg_a0'))}, 'scales'),
        (tiny_model(features_only=True), {}, 'FeatureListNet'),
        (damaged, {}, rf"{TINY}: 'stem\.bn\.running_var'"),
        (path, {'scales': model.scales}, r"last\.pth\.tar: 'stem\.bn\.running_var'"),
    ):
        with pytest.raises(ValueError, match=named):
            push_to_hub(source, REPO, **given)
        with pytest.raises(ValueError, match=named):
            save_pretrained(source, tmp_path / 'out', **given)
    assert not hub.requests and not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'changes',
    [
        {'args': argparse.Namespace(model_kwargs=[1])},
        {'arch': 'repopt_vgg_a0.bogus'},
        {'optimizer': [1]},
        {'history': [{'eval_top1': 'high'}]},
    ],
    ids=str,
)
def test_a_checkpoint_of_other_content_is_named(tmp_path, changes):
    model = trained()
    path = checkpoint_of(model, tmp_path / 'last.pth.tar', changes)
    with pytest.raises(ValueError, match=r'last\.pth\.tar'):
        save_pretrained(path, tmp_path / 'out', scales=model.scales)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('kind', ['', '_hs', '_csla'])
def test_no_config_names_scales(tmp_path, kind):
    model = trained(kind)
    save_pretrained(model, tmp_path / 'ours')
    save_for_hf(model, str(tmp_path / 'timms'), safe_serialization=True)
    for name in ('ours', 'timms'):
        config = (tmp_path / name / 'config.json').read_text()
        assert 'scales' not in config and json.loads(config)['architecture'] == TINY + kind


def test_a_wrapped_model_is_saved_as_the_plain_one(tmp_path):
    model = trained()
    save_pretrained(model, tmp_path / 'plain')
    wrapped = torch.nn.DataParallel(torch.compile(model.to(memory_format=torch.channels_last)))
    save_pretrained(wrapped, tmp_path / 'wrapped', repo_id='USER/plain')
    assert read_tree(tmp_path / 'wrapped') == read_tree(tmp_path / 'plain')


def test_tied_tensors_and_scales_of_compiled_parts_have_the_names_of_the_plain_network(tmp_path, images):
    model = timm.create_model('test_byobnet', num_classes=5).eval()
    norms = [each for each in model.modules() if isinstance(each, torch.nn.BatchNorm2d) and each.num_features == 32]
    norms[1].weight = norms[0].weight
    expected = model(images)
    model.stages = torch.compile(model.stages)
    save_pretrained(model, tmp_path / 'tied')
    assert torch.equal(load(tmp_path / 'tied')(images), expected)
    model = trained()
    scales = Scales.from_model(model)
    model.stages = torch.compile(model.stages)
    prepare(model, scales, init=False)
    save_pretrained(model, tmp_path / 'scaled')
    assert Scales.from_model(load(tmp_path / 'scaled')) == scales
