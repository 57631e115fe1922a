import pytest
import torch
from huggingface_hub import ModelCard

from repopt_timm import load_scales, push_scales, save_pretrained, save_scales_card
from repopt_timm.cli import main
from repopt_timm.resources import shipped_repositories
from repopt_timm.weights_origin import restore_origin

from ..helpers import TINY, random_scales, tiny_model

REPO = 'ann/tiny'


@pytest.fixture
def mit():
    """Scales under a licence, as published ones are."""
    return random_scales().with_provenance({'license': 'MIT'})


def card_of(folder):
    return ModelCard.load(folder / 'README.md', ignore_metadata_errors=False)


def licence_section(folder):
    return card_of(folder).text.partition('## Licence')[2].split('\n')[2]


def test_a_card_of_scales_states_the_licence_of_their_provenance(mit, tmp_path):
    save_scales_card(mit, tmp_path)
    assert card_of(tmp_path).data.license == licence_section(tmp_path) == 'mit'


def test_scales_from_a_card_keep_its_licence(tmp_path):
    save_scales_card(random_scales(), tmp_path / 'first', license='cc-by-4.0')
    assert main(['scales', 'convert', str(tmp_path / 'first'), str(tmp_path / 'second')]) == 0
    assert card_of(tmp_path / 'second').data.license == 'cc-by-4.0'


def test_what_has_no_known_licence_claims_none_and_says_how_to_give_one(hub, client, tmp_path, caplog):
    save_scales_card(random_scales(), tmp_path / 'scales')
    save_pretrained(tiny_model(), tmp_path / 'weights')
    for name in ('scales', 'weights'):
        assert card_of(tmp_path / name).data.license is None
        assert licence_section(tmp_path / name) == 'Not stated.'
        assert f'The card of {name} states no licence, as none is known. Give one with --license' in caplog.text
    assert len(caplog.records) == 2
    push_scales(random_scales(), REPO)
    assert 'license' not in hub.repo(REPO).read('README.md').decode()
    assert 'The card of tiny states no licence' in caplog.text


def test_the_licence_of_scales_is_not_claimed_for_the_weights_that_they_trained(mit, tmp_path):
    save_pretrained(tiny_model(scales=mit), tmp_path)
    assert card_of(tmp_path).data.license is None


@pytest.mark.parametrize(
    ('given', 'stated'), [('BSD-2-Clause', ('bsd-2-clause', None)), ('our-license', ('other', 'our-license'))]
)
def test_a_given_licence_goes_before_a_known_one(given, stated, mit, hub, client, tmp_path, caplog):
    model = tiny_model()
    restore_origin(model, {'license': 'mit'})
    save_scales_card(mit, tmp_path / 'scales', license=given)
    save_pretrained(model, tmp_path / 'weights', license=given)
    push_scales(mit, REPO, license=given)
    for card in (card_of(tmp_path / 'scales'), card_of(tmp_path / 'weights'), ModelCard.load(REPO)):
        assert (card.data.license, card.data.license_name) == stated
    assert f'states the licence {given.lower()}, but that of its content is mit' in caplog.text


@pytest.mark.parametrize(
    ('front', 'name'),
    [
        ('license: cc-by-4.0', 'cc-by-4.0'),
        ('license: other\nlicense_name: mine', 'mine'),
        ('license: other', 'other'),
        ('license: [mit, apache-2.0]', 'mit, apache-2.0'),
    ],
)
def test_a_licence_that_a_card_states_stays(front, name, mit, tmp_path, caplog):
    (tmp_path / 'README.md').write_text(f'---\n{front}\n---\n')
    save_scales_card(mit, tmp_path, license='gpl-3.0')
    assert licence_section(tmp_path) == name
    before = ModelCard(f'---\n{front}\n---\n').data
    after = card_of(tmp_path).data
    assert (after.license, after.license_name) == (before.license, before.license_name)
    assert f'states the licence {name}, but the given one is gpl-3.0: mend `license` in it' in caplog.text


@pytest.mark.parametrize('name', [*shipped_repositories()])
def test_the_cards_that_ship_state_the_licence_of_this_package(name):
    assert load_scales(name).provenance['license'] == 'apache-2.0'


def test_what_is_not_an_identifier_is_refused_before_anything_is_made(hub, client, tmp_path):
    for call in (
        lambda: save_scales_card(random_scales(), tmp_path / 'new', license='my own'),
        lambda: save_pretrained(tiny_model(), tmp_path / 'new', license='my own'),
        lambda: push_scales(random_scales(), REPO, license='my own'),
    ):
        with pytest.raises(ValueError, match=r"^The licence is 'my own', expected an identifier without spaces"):
            call()
    assert not list(tmp_path.glob('new')) and not hub.requests


@pytest.mark.parametrize(
    'command',
    [
        'save {checkpoint} {out} --license mit',
        'scales convert {scales} {out} --license mit',
        'scales extract {scales} {out} --license mit',
        'convert-checkpoint {checkpoint} --out {out} --license mit',
    ],
)
def test_each_command_that_writes_a_card_takes_a_licence(command, tmp_path):
    random_scales().save(tmp_path / 'scales.safetensors')
    kind = '_branches' if command.startswith('convert') else ''
    content = {'arch': TINY + kind, 'state_dict': tiny_model(kind).state_dict()}
    torch.save(content, tmp_path / 'last.pth.tar')
    places = {'checkpoint': tmp_path / 'last.pth.tar', 'scales': tmp_path / 'scales.safetensors'}
    assert main(command.format(out=tmp_path / 'out', **places).split()) == 0
    assert card_of(tmp_path / 'out').data.license == 'mit'


def test_a_file_of_scales_takes_no_licence(tmp_path, capsys):
    random_scales().save(tmp_path / 'a.safetensors')
    assert main(['scales', 'convert', *(str(tmp_path / f'{x}.safetensors') for x in 'ab'), '--license', 'mit']) == 1
    assert "b.safetensors': --license goes into a model card, expected a folder" in capsys.readouterr().err
