import pytest
import torch
from huggingface_hub import ModelCard

from repopt_timm import load_scales, push_scales, save_pretrained
from repopt_timm.cards.publish import save_scales_card
from repopt_timm.cli import main
from repopt_timm.resources import shipped_repositories
from repopt_timm.weights_origin import restore_origin

from ..helpers import TINY, card_of, random_scales, tiny_model

REPO = 'ann/tiny'


@pytest.fixture
def mit():
    """Scales under a licence, as published ones are."""
    return random_scales().with_provenance({'license': 'MIT'})


def licence_of(folder):
    """The licence in the metadata of a card, its name, and what its text says."""
    card = card_of(folder)
    return card.data.license, card.data.license_name, card.text.partition('## Licence')[2].split('\n')[2]


def test_scales_and_their_card_state_the_same_licence(mit, tmp_path):
    save_scales_card(mit, tmp_path)
    assert licence_of(tmp_path) == ('mit', None, 'mit')
    save_scales_card(random_scales(), tmp_path / 'given', license='cc-by-4.0')
    assert load_scales(tmp_path / 'given').provenance == {'license': 'cc-by-4.0'}
    assert {load_scales(name).provenance['license'] for name in shipped_repositories()} == {'apache-2.0'}


def test_what_has_no_known_licence_claims_none_and_says_how_to_give_one(mit, tmp_path, caplog):
    save_scales_card(random_scales(), tmp_path / 'scales')
    # The licence of scales is not that of the weights that they trained.
    save_pretrained(tiny_model(scales=mit), tmp_path / 'weights')
    for name in ('scales', 'weights'):
        assert licence_of(tmp_path / name) == (None, None, 'Not stated.')
        assert name in caplog.text and '--license' in caplog.text


def test_a_given_licence_goes_before_a_known_one(mit, hub, client, tmp_path, caplog):
    model = tiny_model()
    restore_origin(model, {'license': 'mit'})
    save_pretrained(model, tmp_path, license='our-license')
    assert licence_of(tmp_path) == ('other', 'our-license', 'our-license')
    push_scales(mit, REPO, license='BSD-2-Clause')
    assert ModelCard.load(REPO).data.license == 'bsd-2-clause'
    assert caplog.text.count('but that of its content is mit') == 2


@pytest.mark.parametrize(
    ('front', 'stated'),
    [
        ('license: other\nlicense_name: mine', ('other', 'mine', 'mine')),
        ('license: [mit, apache-2.0]', (['mit', 'apache-2.0'], None, 'mit, apache-2.0')),
    ],
)
def test_a_licence_that_a_card_states_stays(front, stated, mit, tmp_path, caplog):
    (tmp_path / 'README.md').write_text(f'---\n{front}\n---\n')
    save_scales_card(mit, tmp_path, license='gpl-3.0')
    assert licence_of(tmp_path) == stated
    assert f'{stated[2]}, but the given one is gpl-3.0' in caplog.text


def test_what_is_not_an_identifier_is_refused_before_anything_is_made(hub, client, tmp_path):
    for call in (
        lambda: save_pretrained(tiny_model(), tmp_path / 'new', license='my own'),
        lambda: push_scales(random_scales(), REPO, license='my own'),
    ):
        with pytest.raises(ValueError, match='my own'):
            call()
    assert not list(tmp_path.glob('new')) and not hub.requests


def test_each_command_that_writes_a_card_takes_a_licence(tmp_path):
    random_scales().save(tmp_path / 'scales.safetensors')
    for kind in ('', '_branches'):
        torch.save({'arch': TINY + kind, 'state_dict': tiny_model(kind).state_dict()}, tmp_path / f'last{kind}.pth')
    for command in (
        'save {tmp}/last.pth {tmp}/save',
        'scales extract {tmp}/scales.safetensors {tmp}/scales',
        'convert-checkpoint {tmp}/last_branches.pth --out {tmp}/convert-checkpoint',
    ):
        assert main([*command.format(tmp=tmp_path).split(), '--license', 'mit']) == 0
        assert licence_of(tmp_path / command.split()[0])[0] == 'mit'
