import argparse
import json
import os
import re
import subprocess
import sys

import pytest
import timm
import torch
from huggingface_hub import EvalResult, ModelCard
from PIL import Image
from timm.models import save_for_hf

from repopt_timm import Scales, attach_scales, load_scales, prepare, push_scales
from repopt_timm.cards.document import read_card_scales
from repopt_timm.cards.text import render_body
from repopt_timm.cards.writing import save_scales_card
from repopt_timm.optim import build_repopt_sgd
from repopt_timm.publish import push_to_hub, save_pretrained
from repopt_timm.reparam import kind_of

from .helpers import TINY, random_scales, tiny_model

REPO = 'ann/tiny'
TREE = {'README.md', 'config.json', 'model.safetensors', 'scales.png'}


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32)


def trained(kind='', **kwargs):
    """A model with statistics and weights as training leaves them."""
    model = tiny_model(kind, scales=random_scales(strides=kwargs.get('strides', (2,) * 5)), **kwargs)
    channels = kwargs.get('in_chans', 3)
    model(torch.randn(8, channels, 32, 32))
    return model.eval()


def checkpoint_of(model, path, **args):
    """A checkpoint as the training command writes it."""
    torch.save(
        {
            'arch': model.pretrained_cfg['architecture'],
            'state_dict': model.state_dict(),
            'epoch': 2,
            'optimizer': build_repopt_sgd(model, model.scales, lr=0.1).state_dict()
            if kind_of(model) == 'target'
            else {},
            'args': argparse.Namespace(model_kwargs={}, **args),
            'history': [{'epoch': 2, 'eval_top1': 91.25, 'eval_top5': 99.5}],
        },
        path,
    )
    return path


def read_tree(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_model_goes_from_one_cache_into_another(hub, client, images):
    model = trained()
    push_to_hub(model, REPO, metrics={'dataset': 'digits', 'top1': 97.5})
    assert set(hub.repo(REPO).files()) == {'.gitattributes', *TREE}
    client('other', token=None)
    pulled = timm.create_model(f'hf-hub:{REPO}', pretrained=True).eval()
    assert torch.equal(pulled(images), model(images))
    assert pulled.num_classes == 5
    assert load_scales(f'hf-hub:{REPO}') == model.scales
    client('other', offline=True)
    again = timm.create_model(f'hf-hub:{REPO}', pretrained=True).eval()
    assert torch.equal(again(images), model(images))


@pytest.mark.slow
def test_a_model_reaches_another_process(hub, client, images, tmp_path):
    model = trained()
    push_to_hub(model, REPO, private=True)
    torch.save(images, tmp_path / 'images.pt')
    code = (
        'import sys, timm, torch, repopt_timm\n'
        f"model = timm.create_model('hf-hub:{REPO}', pretrained=True).eval()\n"
        'torch.save(model(torch.load(sys.argv[1])), sys.argv[2])'
    )
    command = [sys.executable, '-c', code, str(tmp_path / 'images.pt'), str(tmp_path / 'logits.pt')]
    subprocess.run(command, env={**os.environ, **hub.client_env(tmp_path / 'other', 'hf_ann')}, check=True)
    torch.testing.assert_close(torch.load(tmp_path / 'logits.pt'), model(images))


@pytest.mark.parametrize('kind', ['', '_hs'])
def test_what_is_saved_is_what_is_pushed_and_loads_from_the_folder(hub, client, images, tmp_path, kind):
    model = trained(kind, strides=(1, 2, 2, 2, 2), in_chans=3)
    save_pretrained(model, tmp_path / 'local', metrics={'dataset': 'digits', 'top1': 97.5}, repo_id=REPO)
    tree = read_tree(tmp_path / 'local')
    assert set(tree) == TREE
    push_to_hub(model, REPO, metrics={'dataset': 'digits', 'top1': 97.5})
    assert {name: hub.repo(REPO).read(name) for name in tree} == tree
    loaded = timm.create_model(f'local-dir:{tmp_path / "local"}', pretrained=True).eval()
    assert loaded.strides == (1, 2, 2, 2, 2)
    assert torch.equal(loaded(images), model(images))
    save_pretrained(model, tmp_path / 'local', metrics={'dataset': 'digits', 'top1': 97.5}, repo_id=REPO)
    assert read_tree(tmp_path / 'local') == tree


def test_the_card_shows_results_and_training(hub, client):
    training = {'dataset': 'digits', 'epochs': 3}
    push_to_hub(trained(), REPO, metrics={'top1': 97.5}, training=training)
    # An update of the scales alone is about the same weights.
    push_scales(random_scales(), REPO)
    card = ModelCard.load(REPO)
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ('digits', 'accuracy', 97.5)
    assert card.data.library_name == 'timm'
    assert 'How the weights were trained' in card.text
    assert f"timm.create_model('hf-hub:{REPO}', pretrained=True)" in card.text


def test_a_card_leads_with_what_people_choose_by(tmp_path):
    training = {'dataset': 'hfds/ann/digits', 'epochs': 3}
    save_pretrained(trained(), tmp_path, metrics={'top1': 97.5}, training=training)
    card = tmp_path / 'README.md'
    lead, _, rest = ModelCard.load(card).text.partition('## Usage')
    assert '| Top-1 accuracy, hfds/ann/digits | image size | parameters | multiply adds |' in lead
    assert '| 97.50 % | 3 x 224 x 224 | 0.1 M | ' in lead
    assert 'multiply adds' not in rest
    assert ModelCard.load(card).data.datasets == ['ann/digits']
    # Scales alone change nothing of that.
    save_scales_card(random_scales(), tmp_path)
    assert ModelCard.load(card).text.startswith(lead)


def test_a_card_leads_with_nothing_that_is_not_a_size_or_an_accuracy():
    training = {1: 2, 'parameters': 10**400, 'multiply_adds': True, 'image_size': 224}
    results = [EvalResult('image-classification', 'a', 'a', 'accuracy', value) for value in ('93 %', {'a': 1}, None)]
    body = render_body('ann/tiny', TINY, ['model.safetensors'], training=training, results=results)
    assert body.partition('## Usage')[0].count('|') == 0


def test_other_weights_do_not_take_over_accuracy_and_curves(tmp_path):
    curves = tmp_path / 'mine.png'
    curves.write_bytes(b'picture')
    folder = tmp_path / 'saved'
    save_pretrained(trained(), folder, metrics={'dataset': 'digits', 'top1': 97.5}, curves=curves)
    assert '97.5' in (folder / 'README.md').read_text()
    save_pretrained(trained(), folder)
    card = (folder / 'README.md').read_text()
    assert '97.5' not in card and 'curves.png' not in card
    assert not (folder / 'curves.png').exists()


@pytest.mark.parametrize('channels', [1, 3])
def test_the_first_snippet_of_a_card_classifies_an_image(channels, tmp_path, monkeypatch, capsys):
    model = trained(in_chans=channels)
    model.pretrained_cfg['input_size'] = (channels, 32, 32)
    model.pretrained_cfg |= {
        'mean': (0.5,) * channels,
        'std': (0.25,) * channels,
        'num_classes': 5,
        'label_names': list('abcde'),
    }
    save_pretrained(model, tmp_path)
    Image.new('L', (40, 30)).save(tmp_path / 'image.jpg')
    monkeypatch.chdir(tmp_path)
    snippet = ModelCard.load(tmp_path / 'README.md').text.split('```python\n')[1].split('```')[0]
    exec(snippet.replace(f'hf-hub:USER/{tmp_path.name}', f'local-dir:{tmp_path}'), {})
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line[0] for line in lines) == list('abcde')
    assert sum(float(line[3:-1]) for line in lines) == pytest.approx(100, abs=0.3)


def test_a_model_is_not_published_with_other_scales(tmp_path):
    with pytest.raises(ValueError, match='Publish it with the scales that it was trained with'):
        save_pretrained(trained(), tmp_path, scales=random_scales())


def test_a_checkpoint_becomes_a_repository(images, tmp_path):
    model = trained(in_chans=1)
    path = checkpoint_of(
        model, tmp_path / 'last.pth.tar', data_dir='/somewhere/digits', in_chans=1, input_size=[1, 32, 32], mean=[0.5]
    )
    with pytest.raises(ValueError, match=r'last\.pth\.tar: its model was trained with scales.*Name the scales'):
        save_pretrained(path, tmp_path / 'local')
    with pytest.raises(ValueError, match='it was trained with the scales'):
        save_pretrained(path, tmp_path / 'local', scales=random_scales())
    save_pretrained(path, tmp_path / 'local', scales=model.scales)
    loaded = timm.create_model(f'local-dir:{tmp_path / "local"}', pretrained=True).eval()
    assert torch.equal(loaded(images[:, :1]), model(images[:, :1]))
    assert tuple(loaded.pretrained_cfg['input_size']) == (1, 32, 32)
    assert tuple(loaded.pretrained_cfg['mean']) == (0.5,)
    text = (tmp_path / 'local/README.md').read_text()
    assert '/somewhere' not in text
    results = {result.metric_name: result.metric_value for result in ModelCard(text).data.eval_results}
    assert results == {'Top-1 accuracy': 91.25, 'Top-5 accuracy': 99.5}


def test_a_card_tells_the_seed_and_not_the_tag_of_other_weights(tmp_path):
    model = timm.create_model('test_byobnet', num_classes=5).eval()
    path = tmp_path / 'last.pth.tar'
    args = argparse.Namespace(data_dir='digits', seed=0, input_size=[3, 32, 32])
    torch.save({'arch': 'test_byobnet', 'state_dict': model.state_dict(), 'args': args}, path)
    save_pretrained(path, tmp_path / 'saved')
    card = (tmp_path / 'saved' / 'README.md').read_text()
    assert '| seed | 0 |' in card
    assert 'Weights of `test_byobnet` for [timm](https://github.com/huggingface/pytorch-image-models).\n' in card
    assert 'tag' not in json.loads((tmp_path / 'saved' / 'config.json').read_text())['pretrained_cfg']


def test_a_model_that_could_not_load_8_bit_weights_is_not_saved_with_them(tmp_path):
    with pytest.raises(ValueError, match=r"test_byobnet cannot load 8-bit weights.*use 'float16'"):
        save_pretrained(timm.create_model('test_byobnet'), tmp_path / 'saved', precision='int8')
    assert not (tmp_path / 'saved').exists()


def test_a_card_tells_the_global_batch_and_the_versions_of_the_training(tmp_path):
    model = trained()
    run = {'dataset': 'digits', 'batch_size': 8, 'world_size': 4, 'grad_accum_steps': 2}
    path = checkpoint_of(model, tmp_path / 'last.pth.tar', **run)
    torch.save({**torch.load(path, weights_only=False), 'versions': {'torch': '2.6.0'}}, path)
    save_pretrained(path, tmp_path / 'local', scales=model.scales)
    card = (tmp_path / 'local/README.md').read_text()
    assert '| batch size | 64 |' in card
    assert '| versions | torch 2.6.0 |' in card


def test_a_card_of_8_bit_weights_does_not_claim_the_accuracy_of_the_run(tmp_path):
    model = trained()
    path = checkpoint_of(model, tmp_path / 'last.pth.tar', dataset='digits')
    save_pretrained(path, tmp_path / 'local', scales=model.scales)
    assert ModelCard.load(tmp_path / 'local/README.md').data.eval_results
    save_pretrained(path, tmp_path / 'local', scales=model.scales, precision='int8')
    card = (tmp_path / 'local/README.md').read_text()
    assert '| top1 before rounding | 91.25 |' in card
    assert ModelCard(card).data.eval_results is None


@pytest.mark.parametrize('kind', ['_hs', '_csla'])
def test_a_card_of_a_model_with_branches_offers_no_optimizer_that_refuses_it(tmp_path, kind):
    save_pretrained(trained(kind), tmp_path)
    card = (tmp_path / 'README.md').read_text()
    assert 'multi-branch' in card.partition('## Usage')[0]
    assert "'sgd'" in card.partition('Fine-tune:')[2].partition('##')[0]


def test_the_checkpoint_of_a_search_brings_its_scales(tmp_path):
    model = trained('_hs')
    save_pretrained(checkpoint_of(model, tmp_path / 'last.pth.tar', dataset='digits'), tmp_path / 'local')
    assert read_card_scales(tmp_path / 'local/README.md') == model.scales


def test_a_checkpoint_that_does_not_tell_its_model_is_refused(tmp_path):
    torch.save(trained().state_dict(), tmp_path / 'bare.pth')
    with pytest.raises(ValueError, match=r'bare\.pth: the checkpoint does not name its model'):
        save_pretrained(tmp_path / 'bare.pth', tmp_path / 'local')
    assert not (tmp_path / 'local').exists()


def test_scales_of_another_network_are_not_published(hub, client):
    with pytest.raises(ValueError, match='are scales of repopt_vgg_a0, but the model is a test_repopt_vgg'):
        push_to_hub(trained(), REPO, scales=Scales.initial(timm.create_model('repopt_vgg_a0')))
    with pytest.raises(ValueError, match='no dataset is named'):
        push_to_hub(trained(), REPO, metrics={'top1': 97.5})
    assert not hub.requests


def test_a_sharded_model_is_not_published(shard, tmp_path):
    with pytest.raises(ValueError, match=r"'stem\.conv\.weight' is sharded.*full_state_dict=True"):
        save_pretrained(shard(trained()), tmp_path / 'local')
    assert not (tmp_path / 'local').exists()


def test_a_model_without_scales_goes_without(tmp_path):
    save_pretrained(tiny_model(), tmp_path)
    assert set(read_tree(tmp_path)) == TREE - {'scales.png'}
    with pytest.raises(ValueError, match="no key 'repopt'"):
        read_card_scales(tmp_path / 'README.md')


def test_a_checkpoints_training_curves_are_drawn(tmp_path):
    model = trained()
    checkpoint = torch.load(checkpoint_of(model, tmp_path / 'last.pth', dataset='digits'), weights_only=False)
    checkpoint['history'] = [{'epoch': epoch, 'train_loss': 1.0, 'eval_top1': 50.0} for epoch in range(3)]
    torch.save(checkpoint, tmp_path / 'last.pth')
    save_pretrained(tmp_path / 'last.pth', tmp_path / 'out', scales=model.scales)
    assert Image.open(tmp_path / 'out' / 'curves.png').width > 500
    assert '(curves.png)' in (tmp_path / 'out' / 'README.md').read_text()


def test_the_picture_of_the_training_curves_comes_along(hub, client, tmp_path):
    Image.new('RGB', (4, 4)).save(tmp_path / 'c.png')
    push_to_hub(trained(), REPO, curves=tmp_path / 'c.png')
    assert hub.repo(REPO).read('curves.png') == (tmp_path / 'c.png').read_bytes()
    push_scales(random_scales(), REPO)
    assert '(curves.png)' in ModelCard.load(REPO).text


def test_an_error_leaves_a_folder_as_it_was(tmp_path):
    save_pretrained(trained(), tmp_path)
    (tmp_path / 'README.md').write_text('---\na: [\n---\n')
    before = read_tree(tmp_path)
    with pytest.raises(ValueError, match=r'README\.md: its metadata cannot be read'):
        save_pretrained(trained(), tmp_path)
    assert read_tree(tmp_path) == before


@pytest.mark.parametrize('kind', ['', '_hs', '_csla'])
def test_no_config_names_scales(hub, client, tmp_path, kind):
    model = trained(kind)
    save_pretrained(model, tmp_path / 'ours')
    save_for_hf(model, str(tmp_path / 'timms'), safe_serialization=True)
    timm.models.push_to_hf_hub(model, 'ann/timms')
    configs = [(tmp_path / name / 'config.json').read_text() for name in ('ours', 'timms')]
    configs.append(hub.repo('ann/timms').read('config.json').decode())
    for config in configs:
        assert 'scales' not in config
        assert json.loads(config)['architecture'] == TINY + kind


def test_what_timm_pushes_takes_scales_afterwards(hub, client, images):
    model = trained()
    timm.models.push_to_hf_hub(model, REPO)
    push_scales(model.scales, REPO)
    client('other', token=None)
    assert load_scales(f'hf-hub:{REPO}') == model.scales
    assert torch.equal(timm.create_model(f'hf-hub:{REPO}', pretrained=True).eval()(images), model(images))
    assert 'Model card for tiny' in ModelCard.load(REPO).text


def test_weights_that_break_off_are_not_used(hub, client, tmp_path):
    push_to_hub(trained(), REPO)
    client('other')
    hub.drop_downloads('model.safetensors', after=4000, times=9, reset=True)
    with pytest.raises(Exception, match=r'[Cc]onnection|reset|read'):
        timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    assert not list((tmp_path / 'other').glob('hub/models--*/snapshots/*/model.safetensors'))


@pytest.mark.parametrize(('precision', 'part'), [('float16', 0.55), ('int8', 0.35)])
def test_weights_are_saved_in_fewer_bits_and_restored_on_load(precision, part, tmp_path, images):
    model = trained()
    save_pretrained(model, tmp_path / 'whole')
    save_pretrained(model, tmp_path / 'packed', precision=precision)
    sizes = [(tmp_path / name / 'model.safetensors').stat().st_size for name in ('whole', 'packed')]
    assert sizes[1] < part * sizes[0]
    assert f'weights: {precision}' in (tmp_path / 'packed' / 'README.md').read_text()
    loaded = timm.create_model(f'local-dir:{tmp_path / "packed"}', pretrained=True).eval()
    assert loaded.stem.conv.weight.dtype == torch.float32
    torch.testing.assert_close(loaded(images), model(images), rtol=0.05, atol=0.05)
    assert not torch.equal(loaded(images), model(images))


def test_an_unknown_precision_is_told_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="precision 'int4'"):
        save_pretrained(trained(), tmp_path / 'new', precision='int4')
    assert not (tmp_path / 'new').exists()


def test_a_wrapped_model_is_saved_as_the_plain_one(tmp_path):
    model = trained()
    save_pretrained(model, tmp_path / 'plain')
    wrapped = torch.nn.DataParallel(torch.compile(model.to(memory_format=torch.channels_last)))
    save_pretrained(wrapped, tmp_path / 'wrapped', repo_id='USER/plain')
    assert read_tree(tmp_path / 'wrapped') == read_tree(tmp_path / 'plain')


def test_tied_tensors_and_compiled_parts_have_the_names_that_timm_loads(tmp_path, images):
    model = timm.create_model('test_byobnet', num_classes=5).eval()
    norms = [each for each in model.modules() if isinstance(each, torch.nn.BatchNorm2d) and each.num_features == 32]
    norms[1].weight = norms[0].weight
    expected = model(images)
    model.stages = torch.compile(model.stages)
    save_pretrained(model, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(loaded(images), expected)


def test_scales_of_compiled_parts_have_the_names_of_the_plain_network(tmp_path):
    model = trained()
    scales = Scales.from_model(model)
    model.stages = torch.compile(model.stages)
    attach_scales(model, scales)
    save_pretrained(model, tmp_path)
    assert Scales.from_model(timm.create_model(f'local-dir:{tmp_path}', pretrained=True)) == scales


def test_what_is_not_finite_is_not_published(hub, client, tmp_path):
    model = trained()
    with pytest.raises(ValueError, match="'top1' is nan, expected a finite number"):
        push_to_hub(model, REPO, metrics={'dataset': 'digits', 'top1': float('nan')})
    with pytest.raises(ValueError, match=r'training\.lr is inf, expected a finite number'):
        push_to_hub(model, REPO, training={'lr': float('inf')})
    with torch.no_grad():
        model.head.fc.bias[1] = float('nan')
    path = checkpoint_of(model, tmp_path / 'last.pth.tar', dataset='digits')
    for source in (model, path):
        with pytest.raises(
            ValueError, match=r"(test_repopt_vgg|last.pth.tar): 'head.fc.bias' has values that are not finite"
        ):
            push_to_hub(source, REPO, scales=model.scales)
    assert not hub.requests


@pytest.mark.parametrize(
    'changes',
    [
        {'args': argparse.Namespace(model_kwargs=[1])},
        {'args': argparse.Namespace(model_kwargs={'bogus': 1})},
        {'args': argparse.Namespace(input_size=3)},
        {'arch': 'repopt_vgg_a0.bogus'},
        {'optimizer': [1]},
        {'optimizer': {'param_groups': 3}},
        {'history': 'long'},
        {'history': [{'eval_top1': 'high'}]},
    ],
    ids=str,
)
def test_a_checkpoint_of_other_content_is_named(tmp_path, changes):
    model = trained()
    path = checkpoint_of(model, tmp_path / 'last.pth.tar')
    torch.save({**torch.load(path, weights_only=False), **changes}, path)
    with pytest.raises(ValueError, match=r"last\.pth\.tar' does not hold the model of a run: "):
        save_pretrained(path, tmp_path / 'out', scales=model.scales)
    assert not (tmp_path / 'out').exists()


def test_no_error_names_a_temporary_folder(tmp_path):
    model = trained()
    save_pretrained(model, tmp_path)
    with open(tmp_path / 'README.md', 'a') as card:
        card.write('<!-- repopt-timm: end -->')
    with pytest.raises(ValueError, match=f'^{tmp_path}/README.md: expected one begin mark'):
        save_pretrained(model, tmp_path)


def snippets(folder):
    """The Python blocks of a card, with the repository read from its folder."""
    text = (folder / 'README.md').read_text().replace(f'hf-hub:USER/{folder.name}', f'local-dir:{folder}')
    return re.findall(r'```python\n(.+?)```', text, re.S)


def test_snippets_of_a_network_of_timms_own_run(tmp_path):
    model = timm.create_model('test_resnet', num_classes=5)
    save_pretrained(prepare(model, Scales.initial(model)), tmp_path)
    _, train, tune = snippets(tmp_path)
    for snippet in (train.replace('local-dir:', ''), tune):
        names = {}
        exec(snippet.replace("load_scales('local-dir:", "load_scales('"), names)
        assert type(names['optimizer']).__name__ == 'RepOptSGD'


def test_snippets_of_a_network_unknown_to_timm_run(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1))
    save_scales_card(Scales.initial(model), tmp_path)
    _, train, search = snippets(tmp_path)
    for snippet in (train, search):
        assert 'model = ...  # your Sequential' in snippet
        names = {'given': model}
        exec(snippet.replace('local-dir:', '').replace('= ...', '= given'), names)
        model = names.get('search', model)
    assert kind_of(model) == 'hs'
