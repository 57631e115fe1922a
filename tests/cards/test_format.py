import base64
import time
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from repopt_timm import Scales, load_scales, save_scales_card
from repopt_timm.cards import document
from repopt_timm.cards.card import BEGIN, END, eval_results, read_card_scales
from repopt_timm.cards.format import decode_scales, encode_scales
from repopt_timm.cards.publish import write_card

from ..helpers import TINY, random_scales

RESULTS = """\
model-index:
- name: mine
  results:
  - task:
      type: image-classification
    dataset:
      name: Digits
      type: digits
    metrics:
    - type: accuracy
      value: 97.5
      name: Top-1 accuracy
"""


STEM = 'any -> {} channels, 3x3, stride 2x2, groups 1'


@pytest.fixture
def card(tmp_path):
    save_scales_card(random_scales().with_provenance({'dataset': 'digits', 'epochs': 3}), tmp_path)
    return tmp_path / 'README.md'


def metadata_of(card: Path) -> dict:
    return ModelCard.load(card).data.to_dict()


def rewrite(card: Path, change) -> None:
    """Changes the metadata of a card behind our back."""
    model_card = ModelCard.load(card)
    change(model_card.data['repopt'])
    model_card.save(card)


def test_every_bit_comes_back():
    scales = random_scales(strides=(1, 1, 2, 2, 2)).with_provenance({'dataset': 'digits', 'versions': {'timm': '1'}})
    odd = dict(scales['stem.conv'], kxk=torch.tensor([-0.0, 1e-45, 3e38, 0.1] * 4))
    counts = {'stem.conv': {'kxk': 4}}
    scales = Scales(TINY, {**scales, 'stem.conv': odd}, scales.geometry, counts, scales.provenance)
    back = decode_scales(yaml.safe_load(yaml.safe_dump(encode_scales(scales), sort_keys=False)), 'text')
    assert back == scales
    assert back.provenance == scales.provenance
    assert (back.geometry, back.counts) == (scales.geometry, scales.counts)


def test_bytes_of_one_significance_stand_together_which_makes_a_card_smaller():
    vector = 1 + 0.1 * torch.randn(4096)
    scales = Scales('net', {'conv': {'kxk': vector}})
    packed = base64.b64decode(encode_scales(scales)['modules']['conv']['data'])
    assert len(packed) < 0.9 * len(zlib.compress(vector.numpy().tobytes(), 9))


@pytest.mark.parametrize(
    ('architecture', 'limit'),
    [('repopt_vgg_b1', 300_000), pytest.param('repopt_vgg_l2', 600_000, marks=pytest.mark.slow)],
)
def test_a_card_is_small(tmp_path, architecture, limit):
    scales = random_scales(architecture)
    save_scales_card(scales, tmp_path)
    assert (tmp_path / 'README.md').stat().st_size < limit
    assert read_card_scales(tmp_path / 'README.md') == scales


def test_the_same_scales_make_the_same_card(card):
    first = {file.name: file.read_bytes() for file in card.parent.iterdir()}
    assert set(first) == {'README.md', 'scales.png'}
    save_scales_card(read_card_scales(card), card.parent)
    assert {file.name: file.read_bytes() for file in card.parent.iterdir()} == first


def test_an_update_keeps_what_others_wrote(card):
    model_card = ModelCard.load(card)
    model_card.data.license = 'mit'
    model_card.data['datasets'] = ['digits']
    model_card.data['my-key'] = {'nested': [1, 'two', None]}
    model_card.text = f'# My notes\n{model_card.text}\nMore of mine.\n'
    model_card.save(card)
    scales = random_scales()
    save_scales_card(scales, card.parent)
    text, data = card.read_text(), metadata_of(card)
    assert read_card_scales(card) == scales
    assert (data['license'], data['datasets'], data['my-key']) == ('mit', ['digits'], {'nested': [1, 'two', None]})
    assert '# My notes' in text.split(BEGIN)[0]
    assert 'More of mine.' in text.split(END)[1]
    assert scales.fingerprint in text.split(BEGIN)[1].split(END)[0]


def test_a_card_of_somebody_elses_gets_our_text_after_its_own(tmp_path):
    (tmp_path / 'README.md').write_text('# Only text, and no metadata\n')
    save_scales_card(random_scales(), tmp_path)
    assert ModelCard.load(tmp_path / 'README.md').text.startswith(f'# Only text, and no metadata\n\n{BEGIN}')


def test_marks_that_were_torn_apart_are_not_guessed_about(card):
    card.write_text(card.read_text().replace(END, ''))
    before = card.read_bytes()
    with pytest.raises(ValueError, match='one begin mark of repopt-timm and one end mark after it, found 1 and 0'):
        save_scales_card(random_scales(), card.parent)
    assert card.read_bytes() == before


def test_results_are_merged_into_the_index(card):
    card.write_text(card.read_text().replace('---\n', f'---\n{RESULTS}', 1))
    scales = read_card_scales(card)
    results = eval_results({'dataset': 'digits', 'top1': 98.0, 'top5': 99.9})
    write_card(card.parent, None, TINY, scales, results)
    found = [(r.dataset_name, r.metric_name, r.metric_value) for r in ModelCard.load(card).data.eval_results]
    assert found == [
        ('digits', 'Top-1 accuracy', 98.0),
        ('digits', 'Top-5 accuracy', 99.9),
    ]
    write_card(card.parent, None, TINY, None, eval_results({'dataset': 'cifar10', 'top1': 90.0}))
    assert [result.metric_value for result in ModelCard.load(card).data.eval_results] == [98.0, 99.9, 90.0]
    assert read_card_scales(card) == scales


@pytest.mark.parametrize(
    'index',
    [
        RESULTS + RESULTS.split('\n', 1)[1].replace('mine', 'other'),
        'model-index:\n- name: mine\n',
        'model-index: what is this\n',
        RESULTS.replace('    metrics:', '    extra: 1\n    metrics:'),
    ],
    ids=['two models', 'no results', 'text', 'unknown field'],
)
def test_an_index_that_the_client_would_change_is_left_alone(card, index):
    scales = read_card_scales(card)
    card.write_text(card.read_text().replace('---\n', f'---\n{index}', 1))
    before = card.read_bytes()
    with pytest.raises(ValueError, match=r'README\.md: its metadata.*model.index'):
        save_scales_card(random_scales(), card.parent)
    assert card.read_bytes() == before
    assert read_card_scales(card) == scales


def test_a_tampered_card_is_refused(card):
    values = torch.tensor([1.5] * 32).numpy().tobytes()
    forged = {'data': base64.b64encode(zlib.compress(values)).decode()}
    rewrite(card, lambda entry: entry['modules']['stem.conv'].update(forged))
    with pytest.raises(ValueError, match=r'README\.md: the scales do not match their fingerprint'):
        read_card_scales(card)


def test_a_card_that_is_too_new_asks_for_an_upgrade_and_is_not_overwritten(card):
    rewrite(card, lambda entry: entry.update(format=4))
    before = card.read_bytes()
    for call in (lambda: read_card_scales(card), lambda: save_scales_card(random_scales(), card.parent)):
        with pytest.raises(ValueError, match=r'README\.md.*version 4 of its format.*upgrade repopt-timm'):
            call()
    assert card.read_bytes() == before


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda e: e.pop('modules'), "has no 'modules'"),
        (lambda e: e.update(format='1'), "'format' is text of 1 characters, expected an integer"),
        (lambda e: e.update(modules=['stem.conv']), "'modules' is a value of type list, expected a mapping"),
        (lambda e: e.update(architecture="x'); import os"), 'architecture: found text of 14 characters'),
        (lambda e: e['modules'].update({7: {}}), 'name of a module: found a value of type int'),
        (lambda e: e['modules'].update({'stem.conv': 'eJz'}), "module 'stem.conv' is text of 3 characters"),
        (lambda e: e['modules']['stem.conv'].update(data='eJz#'), 'is not a zlib stream in base64'),
        (lambda e: e['modules']['stem.conv'].update(geometry=STEM.format(15)), 'unpacks to more than 120 bytes'),
        (lambda e: e['modules']['stem.conv'].update(geometry=STEM.format(17)), 'unpacks to 128 bytes, expected 136'),
        (lambda e: e['modules']['stem.conv'].update(geometry=STEM.format(2 << 20)), '2097152 channels are refused'),
        (lambda e: e['modules']['stem.conv'].update(geometry='3x3'), "'3x3' is not a geometry such as"),
        (lambda e: e['modules']['stem.conv'].update(data=with_rest(e)), 'unpacks to 128 bytes, expected 128'),
        (lambda e: e['modules']['stem.conv'].update(counts={'kxk': 0}), 'has the count 0, expected'),
        (lambda e: e['modules']['stem.conv'].update(counts={'kxk': 10**18}), 'expected an integer from 1 to 1000'),
        (lambda e: e['modules']['stem.conv'].update(branches=['kxk', '1x1']), 'are not sorted'),
        (lambda e: e['provenance'].update({3: 4}), 'provenance has a value of type int as a key'),
    ],
)
def test_what_is_not_in_the_format_is_named(card, change, message):
    rewrite(card, change)
    with pytest.raises(ValueError, match=rf'README\.md.*{message}'):
        read_card_scales(card)


def with_rest(entry: dict) -> str:
    return base64.b64encode(base64.b64decode(entry['modules']['stem.conv']['data']) + b'rest').decode()


def bomb(count: int, size: int, channels: int) -> dict:
    data = base64.b64encode(zlib.compress(bytes(size), 9)).decode()
    module = {'channels': channels, 'branches': ['kxk'], 'data': data}
    return {f'module{index}': dict(module) for index in range(count)}


@pytest.mark.parametrize(
    'modules', [bomb(1, 1 << 26, 16), bomb(1, 1 << 26, 1 << 24), bomb(200, 1 << 22, 1 << 20), bomb(1001, 64, 16)]
)
def test_a_card_bomb_is_refused_before_it_unpacks(card, modules):
    rewrite(card, lambda entry: entry.update(modules=modules))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r'README\.md'):
        read_card_scales(card)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30_000_000


@pytest.mark.parametrize(
    ('front', 'message'),
    [
        ('a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n', 'it uses a YAML alias'),
        (f'a: {"[" * 500}{"]" * 500}\n', 'nested more than 32 levels'),
        # Some versions of libyaml look ahead, and have a limit of their own.
        (f'a: {"[" * 5000}{"]" * 5000}\n', '(nested more than 32 levels|exceeded maximum nesting depth)'),
        ('a: [\n', 'its metadata cannot be read'),
        ('- a list\n', 'should be a mapping, but is a value of type list'),
        ('a: !!python/object/apply:os.getcwd []\n', 'could not determine a constructor'),
        (f'a: 1{":1" * 150_000}\n', 'a number of 300001 characters'),
        (f'a: !!int "1{":1" * 150_000}"\n', 'a number of 300001 characters'),
        (f'a: 1{":1" * 150_000}.5\n', 'a number of 300003 characters'),
        (f'a: 0x{"f" * 1_000_000}\n', 'a number of 1000002 characters'),
        (f'a: [{"1," * 1_000_000}]\n', 'more than 50000 entries'),
        ('repopt:\n  modules:\n' + '    m: {data: eJw}\n' * 100_000, 'more than 50000'),
        (''.join(f'{index * (2**61 - 1)}: 1\n' for index in range(2, 24_000)), 'a number of 19 characters is a key'),
        (f'a: {"[" * 2_000_000}\n', '(nested more than 32 levels|exceeded maximum nesting depth)'),
        (f'a: !{"x" * 1000} 1\n', 'a tag of more than 100 characters'),
        ('a: 2024-13-99\n', 'month must be in'),
        ('a: !!bool maybe\n', 'a value is not the bool that it seems'),
        ('a: !!int "_"\n', 'a value is not the int that it seems'),
        ('\n' * 2_000_000, "no key 'repopt'"),
    ],
    ids=lambda value: value[:12].strip() if len(value) > 40 else value,
)
def test_yaml_that_could_do_harm_is_refused_at_once(tmp_path, front, message):
    (tmp_path / 'README.md').write_text(f'---\n{front}\n---\n')
    start = time.process_time()
    with pytest.raises(ValueError, match=rf'README\.md.*{message}'):
        read_card_scales(tmp_path / 'README.md')
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ('provenance', 'message'),
    [
        ({'top1': float('nan')}, 'provenance.top1 is nan, expected a finite number'),
        ({'log': ['x'] * 2000}, 'it has more than 1000 entries'),
        ({'log': 'x' * 50_000}, r'a card of \d+ bytes is refused, expected at most 40000'),
        ({'note': chr(0xD800)}, 'surrogates not allowed'),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_a_card_that_could_not_be_read_again_is_not_written(card, monkeypatch, provenance, message):
    monkeypatch.setattr(document, '_MAX_CARD_BYTES', 40_000)
    monkeypatch.setattr(document, '_MAX_NODES', 1000)
    before = card.read_bytes()
    with pytest.raises(ValueError, match=message):
        save_scales_card(random_scales().with_provenance(provenance), card.parent)
    assert card.read_bytes() == before


def test_a_network_that_is_one_convolution_has_a_card(tmp_path):
    scales = Scales.initial(torch.nn.Conv2d(4, 4, 3, padding=1))
    save_scales_card(scales, tmp_path)
    assert read_card_scales(tmp_path / 'README.md') == scales


def test_results_are_finite_numbers():
    with pytest.raises(ValueError, match="'top1' is nan, expected a finite number"):
        eval_results({'dataset': 'digits', 'top1': float('nan')})


def test_a_card_without_scales_or_without_end_is_refused(tmp_path):
    path = tmp_path / 'README.md'
    with pytest.raises(FileNotFoundError, match=r'There is no model card .*README\.md'):
        read_card_scales(path)
    path.write_text('# Nothing\n')
    with pytest.raises(ValueError, match=r"README\.md: no scales in it: its metadata has no key 'repopt'"):
        read_card_scales(path)
    with path.open('wb') as file:
        file.truncate(1 << 32)
    with pytest.raises(ValueError, match='a card of 4294967296 bytes is refused'):
        read_card_scales(path)


def test_a_token_in_the_provenance_stays_out_of_the_card(tmp_path):
    token = 'hf_' + 'aB3' * 11
    save_scales_card(random_scales().with_provenance({'command': f'train --token {token}'}), tmp_path)
    assert 'train --token hf_***' in (tmp_path / 'README.md').read_text()
    assert token not in (tmp_path / 'README.md').read_text()


def test_provenance_cannot_break_the_page(tmp_path):
    provenance = {'dataset': f'a | b\n# Title <script> {END}'}
    save_scales_card(random_scales().with_provenance(provenance), tmp_path)
    text = ModelCard.load(tmp_path / 'README.md').text
    assert '| dataset | a \\| b # Title &lt;script> &lt;!--' in text
    assert text.count(END) == 1


def test_scales_beside_a_card_are_those_that_it_names(tmp_path):
    scales = random_scales()
    save_scales_card(scales, tmp_path, scales_file=True)
    card, file = tmp_path / 'README.md', tmp_path / 'scales.safetensors'
    assert load_scales(tmp_path) == scales
    assert 'They are in `scales.safetensors`;' in card.read_text()
    random_scales().save(file)
    with pytest.raises(ValueError, match='the scales do not match their fingerprint'):
        load_scales(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r'its scales are in scales\.safetensors, which is not beside it'):
        load_scales(tmp_path)
    card.write_text(card.read_text().replace('file: scales.safetensors', 'file: ../scales.safetensors'))
    with pytest.raises(ValueError, match=r"its 'file' is not scales\.safetensors"):
        load_scales(tmp_path)
