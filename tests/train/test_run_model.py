import re

import pytest

from repopt_timm import Scales, save_pretrained
from repopt_timm.cards.publish import save_scales_card
from repopt_timm.sources import default_scales
from repopt_timm.train.command import main

from ..helpers import TINY, random_scales, tiny_model
from .runs import read


def fingerprint(folder):
    """Fingerprint of the scales that a run multiplied with."""
    (found,) = {group['scales_fingerprint'] for group in read(folder)['optimizer']['param_groups']}
    return found


def test_a_target_without_scales_starts_from_the_unsearched_values_and_says_so(arguments, tmp_path, capsys):
    main(arguments('--epochs', '1'))
    checkpoint = read(tmp_path / 'run')
    assert checkpoint['args'].scales == 'initial'
    assert fingerprint(tmp_path / 'run') == Scales.initial(tiny_model()).fingerprint
    assert 'uses the unsearched values, --scales initial' in ''.join(capsys.readouterr())
    # Plain SGD multiplies nothing, and gets no scales.
    main(arguments('--epochs', '1', '--opt', 'sgd', experiment='plain'))
    assert read(tmp_path / 'plain')['args'].scales is None


def test_an_initial_checkpoint_brings_the_scales_that_it_was_trained_with(arguments, tmp_path, capsys):
    random_scales().save(tmp_path / 'mine.safetensors')
    main(arguments('--epochs', '1', '--scales', str(tmp_path / 'mine.safetensors'), experiment='first'))
    first = str(tmp_path / 'first/last.pth.tar')
    main(arguments('--epochs', '1', '--initial-checkpoint', first))
    assert fingerprint(tmp_path / 'run') == fingerprint(tmp_path / 'first')
    # A run that is resumed need not repeat what it started from.
    main(arguments('--epochs', '2', '--resume'))
    assert fingerprint(tmp_path / 'run') == fingerprint(tmp_path / 'first')
    main(arguments('--epochs', '1', '--initial-checkpoint', first, '--scales', 'initial', experiment='other'))
    assert 'this run multiplies with' in ''.join(capsys.readouterr())


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
    with pytest.raises(ValueError, match=f'{TINY}.other has no scales, and none ship for it'):
        default_scales(f'{TINY}.other')


@pytest.mark.parametrize(
    ('name', 'offered'),
    [
        ('repopt_mobileone_s0.apple_in1k', True),
        ('repopt_mobileone_s0', True),
        ('repopt_vgg_b1.rvgg_in1k', True),
        ('repopt_resnet18.a1_in1k', False),
        (f'{TINY}.other', False),
    ],
)
def test_weights_of_branches_are_told_of_the_scales_that_these_imply(name, offered):
    with pytest.raises(ValueError, match=r'has no scales.*--scales initial\.$') as error:
        default_scales(name)
    assert ('imply: --scales implied, ' in str(error.value)) == offered
