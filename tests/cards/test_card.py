import base64
import tracemalloc

import pytest
import torch
from huggingface_hub import ModelCard

from repopt_timm import Scales, load_scales, save_pretrained
from repopt_timm.cards.card import read_card_scales
from repopt_timm.cards.repository import BEGIN, END, save_scales_card
from repopt_timm.sources import shipped_repositories
from repopt_timm.weights_origin import restore_origin

from ..helpers import TINY, card_of, random_scales, read_tree, tiny_model


@pytest.fixture
def card(tmp_path):
    save_scales_card(random_scales().with_provenance({'dataset': 'digits', 'epochs': 3}), tmp_path)
    return tmp_path / 'README.md'


def test_every_bit_comes_back_and_the_same_scales_make_the_same_card(tmp_path):
    scales = random_scales(strides=(1, 1, 2, 2, 2))
    odd = dict(scales['stem.conv'], kxk=torch.tensor([-0.0, 1e-45, 3e38, 0.1] * 4))
    facts = {'dataset': 'digits', 'versions': {'timm': '1'}}
    scales = Scales(TINY, {**scales, 'stem.conv': odd}, scales.geometry, {'stem.conv': {'kxk': 4}}, facts)
    save_scales_card(scales, tmp_path)
    first = read_tree(tmp_path)
    assert set(first) == {'README.md', 'scales.png'}
    back = read_card_scales(tmp_path / 'README.md')
    assert back == scales
    assert (back.provenance, back.geometry, back.counts) == (scales.provenance, scales.geometry, scales.counts)
    assert back.source == str(tmp_path / 'README.md')
    save_scales_card(back, tmp_path)
    assert read_tree(tmp_path) == first


def test_an_update_keeps_what_others_wrote(card):
    model_card = ModelCard.load(card)
    model_card.data['my-key'] = {'nested': [1, 'two', None]}
    model_card.text = f'# My notes\n{model_card.text}\nMore of mine.\n'
    card.write_text('\ufeff' + str(model_card))
    scales = random_scales()
    save_scales_card(scales, card.parent)
    assert card_of(card.parent).data['my-key'] == {'nested': [1, 'two', None]}
    before, _, rest = card.read_text().partition(BEGIN)
    inside, _, after = rest.partition(END)
    assert '# My notes' in before and scales.fingerprint in inside and 'More of mine.' in after
    assert read_card_scales(card) == scales


def test_results_of_others_survive_new_weights_and_accuracies_of_replaced_ones_do_not(tmp_path):
    save_pretrained(tiny_model(), tmp_path, metrics={'dataset': 'digits', 'top1': 97.5, 'robustness': 50, 'speed': 3})
    save_scales_card(random_scales(), tmp_path)
    again = {'dataset': 'digits', 'top5': 99, 'robustness': 60}
    save_pretrained(tiny_model(scales=load_scales(tmp_path)), tmp_path, metrics=again)
    found = sorted((each.metric_name, each.metric_value) for each in card_of(tmp_path).data.eval_results)
    assert found == [('Top-5 accuracy', 99), ('robustness', 60), ('speed', 3)]


def test_a_card_that_could_not_be_carried_through_is_left_alone(card):
    text = card.read_text()
    for broken in (
        '---\nmodel-index:\n- name: a\n  results: []\n- name: b\n  results: []\n---\n',
        '---\na: [\n---\n',
        '---\na: !!python/object/apply:os.getcwd []\n---\n',
        '---\nrepopt: {format: 2}\n---\n',
        f'---\nb: {"x" * (1 << 22)}\n---\n',
        # Marks that were torn apart are not guessed about.
        text.replace(END, ''),
        text.replace(BEGIN, ''),
        text + END,
    ):
        card.write_text(broken)
        with pytest.raises(ValueError, match=f'^{card}'):
            save_scales_card(random_scales(), card.parent)
        assert card.read_text() == broken


def test_a_damaged_or_forged_entry_is_refused(card):
    text = card.read_text()
    for change in (
        lambda entry: entry.pop('scales'),
        lambda entry: entry.update(scales=base64.b64encode(base64.b64decode(entry['scales'])[:-1] + b'x').decode()),
        lambda entry: entry.update(fingerprint='0' * 64),
        lambda entry: entry.update(provenance={'top1': float('nan')}),
    ):
        model_card = ModelCard(text)
        change(model_card.data['repopt'])
        model_card.save(card)
        with pytest.raises(ValueError, match=r'README\.md'):
            read_card_scales(card)
    card.write_text('# Nothing\n')
    assert read_card_scales(card) is None
    with pytest.raises(ValueError, match=r'README\.md'):
        load_scales(card)


def test_a_card_does_not_expand_beyond_its_size(card):
    bomb = 'x: &x0 [a, a, a, a]\n' + ''.join(f'y{n}: &x{n + 1} [*x{n}, *x{n}, *x{n}, *x{n}]\n' for n in range(10))
    text = card.read_text().replace('repopt:', f'{bomb}repopt:').replace('dataset: digits', 'dataset: *x10')
    card.write_text(text)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r'README\.md.*provenance'):
        read_card_scales(card)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_what_could_not_be_read_again_or_could_run_in_a_snippet_is_not_written(card):
    before = card.read_bytes()
    for facts in ({'top1': float('nan')}, {'log': 'x' * (1 << 19)}, {'note': chr(0xD800)}):
        with pytest.raises(ValueError):
            save_scales_card(random_scales().with_provenance(facts), card.parent)
    with pytest.raises(ValueError, match='import os'):
        save_scales_card(random_scales().renamed("x'); import os"), card.parent)
    assert card.read_bytes() == before


def test_facts_show_no_token_and_cannot_break_the_page(tmp_path):
    token = 'hf_' + 'aB3' * 11
    facts = {'command': f'train --token {token}', 'dataset': f'a | b\n# Title <script> {END}'}
    save_scales_card(random_scales().with_provenance(facts), tmp_path)
    text = (tmp_path / 'README.md').read_text()
    assert token not in text
    assert '| dataset | a \\| b # Title &lt;script> &lt;!--' in text
    assert text.partition(BEGIN)[2].count(END) == 1


def test_scales_beside_a_card_are_those_that_it_names(tmp_path):
    scales, update = random_scales().with_provenance({'dataset': 'digits'}), random_scales()
    card, file = tmp_path / 'README.md', tmp_path / 'scales.safetensors'
    save_scales_card(scales, tmp_path, scales_file=True)
    assert load_scales(tmp_path) == load_scales(file) == scales
    assert load_scales(tmp_path).provenance == {'dataset': 'digits'}
    # What was put beside the card stays there.
    save_scales_card(update, tmp_path)
    assert load_scales(file) == update
    scales.save(file)
    with pytest.raises(ValueError, match='fingerprint'):
        load_scales(tmp_path)
    # A card's own name for the file could lead anywhere.
    update.save(tmp_path / 'other.safetensors')
    card.write_text(card.read_text().replace('file: scales.safetensors', 'file: other.safetensors'))
    with pytest.raises(ValueError, match='fingerprint'):
        load_scales(tmp_path)


def licence_of(folder):
    """The licence in the metadata of a card, its name, and what its text says."""
    card = card_of(folder)
    return card.data.license, card.data.license_name, card.text.partition('## Licence')[2].split('\n')[2]


@pytest.mark.parametrize(
    ('front', 'given', 'known', 'expected'),
    [
        ('', None, 'MIT', ('mit', None, 'mit')),
        ('', 'CC-BY-4.0', 'MIT', ('cc-by-4.0', None, 'cc-by-4.0')),
        ('', 'our-license', None, ('other', 'our-license', 'our-license')),
        ('license: other\nlicense_name: mine', 'gpl-3.0', 'MIT', ('other', 'mine', 'mine')),
        ('license: [mit, apache-2.0]', 'gpl-3.0', 'MIT', (['mit', 'apache-2.0'], None, 'mit, apache-2.0')),
    ],
)
def test_a_card_keeps_its_licence_or_states_the_given_or_the_known_one_and_warns_if_they_differ(
    front, given, known, expected, tmp_path, caplog
):
    (tmp_path / 'README.md').write_text(f'---\n{front}\n---\n')
    save_scales_card(random_scales().with_provenance({'license': known} if known else {}), tmp_path, license=given)
    assert licence_of(tmp_path) == expected
    others = {name.lower() for name in (given, known) if name} - {expected[2]}
    assert bool(caplog.messages) == bool(others) and all(name in caplog.text for name in others)
    assert load_scales(tmp_path).provenance['license']


def test_weights_have_a_licence_of_their_own_or_none_and_then_somebody_is_told(tmp_path, caplog):
    model = tiny_model(scales=random_scales().with_provenance({'license': 'mit'}))
    save_pretrained(model, tmp_path)
    assert licence_of(tmp_path) == (None, None, 'Not stated.')
    assert tmp_path.name in caplog.text and '--license' in caplog.text
    with pytest.raises(ValueError, match='my own'):
        save_pretrained(model, tmp_path, license='my own')
    restore_origin(model, {'license': 'apache-2.0'})
    save_pretrained(model, tmp_path)
    assert licence_of(tmp_path)[0] == 'apache-2.0'
    assert {load_scales(name).provenance['license'] for name in shipped_repositories()} == {'apache-2.0'}
