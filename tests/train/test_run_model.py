import re

import pytest
import torch
from torch import nn

from repopt_timm import Scales, load_scales, save_pretrained, to_plain
from repopt_timm.cards.publish import save_scales_card
from repopt_timm.checkpoint_model import model_from_checkpoint
from repopt_timm.sources import default_scales
from repopt_timm.train.command import main

from ..helpers import TINY, random_scales, tiny_model
from .runs import assert_same_bits, read


def fingerprint(folder):
    """Fingerprint of the scales that a run multiplied with."""
    (found,) = {group['scales_fingerprint'] for group in read(folder)['optimizer']['param_groups']}
    return found


def test_a_target_without_scales_starts_from_the_unsearched_values_and_says_so(arguments, tmp_path, capsys):
    main(arguments('--epochs', '1'))
    assert read(tmp_path / 'run')['args'].scales == 'initial'
    assert fingerprint(tmp_path / 'run') == Scales.initial(tiny_model()).fingerprint
    assert 'uses the unsearched values, --scales initial' in ''.join(capsys.readouterr())
    # Plain SGD multiplies nothing, and gets no scales.
    main(arguments('--epochs', '1', '--opt', 'sgd', experiment='plain'))
    assert read(tmp_path / 'plain')['args'].scales is None


def test_a_plain_network_may_start_from_identities(arguments, tmp_path):
    main(arguments('--epochs', '1', '--opt', 'sgd', '--init', 'dirac', '--lr', '0', '--warmup-lr', '0'))
    state = read(tmp_path / 'run')['state_dict']
    for name, conv in tiny_model().named_modules():
        if isinstance(conv, nn.Conv2d):
            start = nn.init.dirac_(torch.empty_like(conv.weight))
            alike = conv.in_channels == conv.out_channels and conv.stride == (1, 1)
            assert torch.equal(state[f'{name}.weight'], start) == alike
    with pytest.raises(ValueError, match='plain networks'):
        main(
            arguments('--epochs', '1', '--opt', 'sgd', '--init', 'dirac', model=f'{TINY}_branches', experiment='twins')
        )


def test_a_csla_run_goes_on_with_its_scales_and_their_start(arguments, tmp_path):
    main(arguments('--epochs', '1', '--opt', 'sgd', '--scales', 'identity', model=f'{TINY}_csla'))
    main(arguments('--epochs', '2', '--opt', 'sgd', '--resume', model=f'{TINY}_csla'))
    assert len(read(tmp_path / 'run')['history']) == 2
    model = model_from_checkpoint(tmp_path / 'run/last.pth.tar')
    assert Scales.from_model(model).start == Scales.from_model(to_plain(model)).start == 'identity'


def test_a_search_may_start_from_identities(arguments, tmp_path):
    main(arguments('--epochs', '1', '--opt', 'sgd', '--scales', 'identity', model=f'{TINY}_hs'))
    assert load_scales(tmp_path / 'run/scales.safetensors').start == 'identity'


def test_an_initial_checkpoint_brings_the_scales_that_it_was_trained_with(arguments, tmp_path, capsys):
    mine = random_scales()
    mine.save(tmp_path / 'mine.safetensors')
    main(arguments('--epochs', '1', '--scales', str(tmp_path / 'mine.safetensors'), experiment='first'))
    first = str(tmp_path / 'first/last.pth.tar')
    # A run that is resumed need not repeat what it started from.
    for extra in (['--epochs', '1', '--initial-checkpoint', first], ['--epochs', '2', '--resume']):
        main(arguments(*extra))
        assert fingerprint(tmp_path / 'run') == fingerprint(tmp_path / 'first') == mine.fingerprint
    main(arguments('--epochs', '1', '--initial-checkpoint', first, '--scales', 'initial', experiment='other'))
    assert 'this run multiplies with' in ''.join(capsys.readouterr())


@pytest.mark.parametrize('model', [TINY, 'test_byobnet'])
def test_an_initial_checkpoint_of_other_classes_brings_all_but_the_classifier(arguments, tmp_path, capsys, model):
    main(arguments('--epochs', '1', model=model, experiment='first'))
    first = tmp_path / 'first/last.pth.tar'
    extra = ['--num-classes', '5', '--epochs', '1', '--lr', '0', '--warmup-lr', '0', '--initial-checkpoint', str(first)]
    main(arguments(*extra, model=model))
    assert 'other classes than the 5 of this run: all weights are loaded but head.fc.bias, head.fc.weight' in (
        capsys.readouterr().err
    )
    before, after = (read(tmp_path / name)['state_dict'] for name in ('first', 'run'))
    kept = [name for name in before if not name.startswith('head.fc') and 'running' not in name and 'num_' not in name]
    assert_same_bits({name: before[name] for name in kept}, {name: after[name] for name in kept})


def test_a_run_that_was_begun_with_shipped_scales_keeps_them(arguments, tmp_path, monkeypatch):
    save_scales_card(random_scales(), tmp_path / 'card')
    monkeypatch.setattr('repopt_timm.sources.shipped_repositories', lambda: {f'{TINY}.mine': tmp_path / 'card'})
    main(arguments('--epochs', '1', '--scales', f'{TINY}.mine'))
    before = fingerprint(tmp_path / 'run')
    # As runs were written for which these were the default.
    path = tmp_path / 'run/args.yaml'
    path.write_text(re.sub('^scales: .*$', 'scales: null', path.read_text(), flags=re.M))
    main(arguments('--epochs', '2', '--resume'))
    assert fingerprint(tmp_path / 'run') == before


def test_an_initial_checkpoint_of_a_fine_tuned_model_brings_the_scales_of_its_repository(arguments, tmp_path):
    save_pretrained(tiny_model(scales=random_scales()), tmp_path / 'published')
    main(arguments('--pretrained', '--epochs', '1', model=f'local-dir:{tmp_path / "published"}', experiment='tuned'))
    main(arguments('--epochs', '1', '--initial-checkpoint', str(tmp_path / 'tuned/last.pth.tar')))
    assert fingerprint(tmp_path / 'run') == fingerprint(tmp_path / 'tuned')


def test_weights_of_another_tag_are_not_trained_with_shipped_scales(tmp_path, monkeypatch):
    save_scales_card(random_scales(), tmp_path / 'card')
    monkeypatch.setattr('repopt_timm.sources.shipped_repositories', lambda: {f'{TINY}.mine': tmp_path / 'card'})
    with pytest.raises(ValueError, match=f'{TINY}.other has no scales'):
        default_scales(f'{TINY}.other')


@pytest.mark.parametrize(('scales', 'said'), [('near', True), ('far', False), ('initial', False)])
def test_a_training_says_if_its_scales_are_close_to_the_initial_values(arguments, tmp_path, capsys, scales, said):
    source = scales
    if scales != 'initial':
        near = Scales.initial(tiny_model())
        vectors = {m: {b: v * 1.01 for b, v in near[m].items()} for m in near}
        made = Scales(near.architecture, vectors, near.geometry, near.counts) if scales == 'near' else random_scales()
        source = str(tmp_path / 'scales.safetensors')
        made.save(source)
    main(arguments('--scales', source, '--epochs', '1'))
    assert ('close to the values that a search starts from' in capsys.readouterr().err) == said
