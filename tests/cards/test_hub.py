import logging
from concurrent.futures import ThreadPoolExecutor

import pytest

from repopt_timm import load_scales, push_scales
from repopt_timm.cards.hub import HubError, HubFileNotFoundError, download, push_folder
from repopt_timm.cards.repository import save_scales_card

from ..helpers import random_scales

REPO = 'ann/tiny'


@pytest.fixture
def scales(hub, client):
    """Scales that ann has published."""
    scales = random_scales()
    push_scales(scales, REPO)
    hub.requests.clear()
    return scales


def test_branches_and_pull_requests_are_separate(hub, client, scales):
    branch, pull = random_scales(), random_scales()
    push_scales(branch, REPO, revision='dev/1')
    client('other', token='hf_bob')
    assert push_scales(pull, REPO, create_pr=True) == f'{hub.endpoint}/{REPO}/discussions/1'
    expected = {'': scales, '@dev/1': branch, f'@{hub.repos[REPO].resolve("dev/1")}': branch, '@refs/pr/1': pull}
    assert {revision: load_scales(f'hf-hub:{REPO}{revision}') for revision in expected} == expected
    assert load_scales(f'hf-hub:{REPO}').source == f'hf-hub:{REPO}'


def test_a_private_repository_is_for_its_owner_and_no_other_is_written_to(hub, client, scales):
    push_scales(scales, 'ann/secret', private=True)
    client('other', 'hf_bob')
    for call in (lambda: load_scales('hf-hub:ann/secret'), lambda: push_scales(random_scales(), REPO)):
        with pytest.raises(HubError, match='hf-hub:ann/'):
            call()
    assert load_scales('hf-hub:ann/secret', token='hf_ann') == load_scales(f'hf-hub:{REPO}') == scales


def test_whatever_is_missing_is_named_on_one_line_without_a_token(client, scales):
    for call, token, named in (
        (lambda: download('ann/none', 'README.md'), 'hf_ann', r'ann/none, file README\.md: .*Not Found'),
        (lambda: download(REPO, 'none.txt'), 'hf_ann', r'ann/tiny, file none\.txt: .*Not Found'),
        (lambda: download(REPO, 'README.md', 'v9'), 'hf_ann', r'ann/tiny@v9, file README\.md: .*Revision Not Found'),
        (lambda: download(REPO, 'README.md'), 'hf_wrong', r'ann/tiny, file README\.md: .*Invalid credentials'),
        (lambda: push_scales(scales, REPO, token='hf_wrong'), 'hf_wrong', 'ann/tiny'),
        (lambda: push_scales(scales, REPO, token='odd token\n'), 'odd token', 'ann/tiny'),
    ):
        client('other', token if token.startswith('hf_') else 'hf_ann')
        with pytest.raises(HubError, match=f'hf-hub:{named}') as caught:
            call()
        assert isinstance(caught.value, HubFileNotFoundError) == ('none.txt' in named.replace('\\', ''))
        assert '\n' not in str(caught.value) and token not in str(caught.value)


def test_offline_needs_a_filled_cache_and_knows_of_files_that_are_not_there(hub, client, scales):
    load_scales(f'hf-hub:{REPO}')
    for offline in (False, True):
        client(offline=offline)
        with pytest.raises(HubFileNotFoundError, match=r'hf-hub:ann/tiny, file none\.txt'):
            download(REPO, 'none.txt')
    hub.requests.clear()
    assert load_scales(f'hf-hub:{REPO}') == scales
    client('empty', offline=True)
    for call in (lambda: load_scales(f'hf-hub:{REPO}'), lambda: push_scales(scales, REPO)):
        with pytest.raises(HubError, match=r'hf-hub:ann/tiny.*HF_HUB_OFFLINE'):
            call()
    assert not hub.requests


def test_eight_pushes_and_an_edit_at_once_lose_nothing(hub, client, scales):
    def push(number):
        def write(folder, *rest):
            with (folder / 'README.md').open('a') as card:
                card.write(f'push {number}\n')
            with hub.lock:
                files = hub.repos[REPO].files()
                if number == 0 and 'notes.txt' not in files:
                    edited = {'README.md': files['README.md'] + b'push of a person\n', 'notes.txt': b'mine'}
                    hub.repos[REPO].commit('refs/heads/main', {**files, **edited})

        return push_folder(REPO, write, 'title')

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(push, range(8)))) == 8
    assert hub.repos[REPO].files()['notes.txt'] == b'mine'
    lines = hub.repos[REPO].files()['README.md'].decode().splitlines()
    assert sorted(lines[-9:]) == [*(f'push {number}' for number in range(8)), 'push of a person']


def test_a_source_cannot_lead_out_of_the_cache(client):
    for text in ('../../secret', '', 'ann/tiny@', 'ann/tiny@../../main', 'ann/tiny@/etc/passwd'):
        with pytest.raises(ValueError):
            load_scales(f'hf-hub:{text}')


def test_scales_of_a_card_that_is_too_large_go_into_a_file_beside_it(hub, client, tmp_path):
    scales = random_scales().with_provenance({'dataset': 'cifar10'})
    save_scales_card(scales, tmp_path / 'small', REPO, scales_file=True)
    hub.readme_limit = (tmp_path / 'small' / 'README.md').stat().st_size + 500
    push_scales(scales, REPO)
    assert {'README.md', 'scales.safetensors'} < set(hub.repos[REPO].files())
    client('other')
    found = load_scales(f'hf-hub:{REPO}')
    assert (found, found.provenance) == (scales, {'dataset': 'cifar10'})


def test_the_client_logs_no_password():
    record = logging.makeLogRecord({'msg': 'HEAD %s, trying again', 'args': ('http://ann:s3cret@host/x',)})
    handlers = logging.getLogger('huggingface_hub').handlers
    assert handlers and all(handler.filter(record) for handler in handlers)
    assert record.getMessage() == 'HEAD http://***@host/x, trying again'
