import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from huggingface_hub import HfApi, ModelCard

from repopt_timm import load_scales, push_scales
from repopt_timm.cards.hub import HubError, HubFileNotFoundError, download, push_folder
from repopt_timm.cards.publish import save_scales_card

from ..helpers import random_scales

REPO = 'ann/tiny'


@pytest.fixture
def scales(hub, client):
    """Scales that ann has published."""
    scales = random_scales()
    push_scales(scales, REPO)
    hub.requests.clear()
    return scales


@pytest.fixture
def no_waits(monkeypatch):
    monkeypatch.setattr('time.sleep', lambda seconds: None)


def edit(card, repo_id=REPO):
    HfApi().upload_file(path_or_fileobj=card.encode(), path_in_repo='README.md', repo_id=repo_id)


def card_text(hub):
    return hub.repo(REPO).read('README.md').decode()


def test_branches_and_pull_requests_are_separate(hub, client, scales):
    branch, pull = random_scales(), random_scales()
    push_scales(branch, REPO, revision='dev/1')
    client('other', token='hf_bob')
    assert push_scales(pull, REPO, create_pr=True) == f'{hub.endpoint}/{REPO}/discussions/1'
    assert load_scales(f'hf-hub:{REPO}') == scales
    assert load_scales(f'hf-hub:{REPO}@dev/1') == load_scales(f'hf-hub:{REPO}@{hub.repo(REPO).resolve("dev/1")}')
    assert load_scales(f'hf-hub:{REPO}@dev/1') == branch
    assert load_scales(f'hf-hub:{REPO}@refs/pr/1') == pull
    assert load_scales(f'hf-hub:{REPO}').source == f'hf-hub:{REPO}'


def test_a_private_repository_is_for_its_owner(hub, client):
    scales = random_scales()
    push_scales(scales, 'ann/secret', private=True)
    client('other', token=None)
    with pytest.raises(HubError, match='hf-hub:ann/secret'):
        load_scales('hf-hub:ann/secret')
    assert load_scales('hf-hub:ann/secret', token='hf_ann') == scales


@pytest.mark.parametrize(
    ('repo_id', 'file', 'revision', 'token', 'message'),
    [
        ('ann/none', 'README.md', None, 'hf_ann', r'hf-hub:ann/none, file README\.md: .*Not Found'),
        (REPO, 'none.txt', None, 'hf_ann', r'hf-hub:ann/tiny, file none\.txt: .*Not Found'),
        (REPO, 'README.md', 'v9', 'hf_ann', r'hf-hub:ann/tiny@v9, file README\.md: .*Revision Not Found'),
        (REPO, 'README.md', None, 'hf_wrong', r'hf-hub:ann/tiny, file README\.md: .*hf auth login'),
    ],
)
def test_whatever_is_missing_is_named_with_the_next_step(client, scales, repo_id, file, revision, token, message):
    client('other', token)
    with pytest.raises(HubError, match=message) as caught:
        download(repo_id, file, revision)
    assert isinstance(caught.value, HubFileNotFoundError) == (file == 'none.txt')
    assert '\n' not in str(caught.value) and (token is None or token not in str(caught.value))


def test_somebody_elses_repository_is_not_written_to(hub, client, scales):
    for token in ('hf_bob', None):
        client('other', token)
        with pytest.raises(HubError, match=r'hf-hub:ann/tiny: .*hf auth login'):
            push_scales(random_scales(), REPO)
    assert load_scales(f'hf-hub:{REPO}') == scales


def test_offline_needs_a_filled_cache_and_knows_of_files_that_are_not_there(hub, client, scales):
    load_scales(f'hf-hub:{REPO}')
    for offline in (False, True):
        client(offline=offline)
        with pytest.raises(HubFileNotFoundError, match=r'hf-hub:ann/tiny, file none\.txt'):
            download(REPO, 'none.txt')
    hub.requests.clear()
    assert load_scales(f'hf-hub:{REPO}') == scales
    client('empty', offline=True)
    with pytest.raises(HubError, match=r'hf-hub:ann/tiny, file README\.md: .*HF_HUB_OFFLINE'):
        load_scales(f'hf-hub:{REPO}')
    with pytest.raises(HubError, match='HF_HUB_OFFLINE'):
        push_scales(scales, REPO)
    assert not hub.requests


def test_answers_keep_their_status(hub, client, scales, no_waits):
    for status in (400, 403, 412, 413):
        hub.faults['/commit/'] = status
        with pytest.raises(HubError, match=f'hf-hub:ann/tiny: .*{status}') as caught:
            push_folder(REPO, lambda folder, *_: (folder / 'new.txt').touch(), 'title')
        assert caught.value.status == status


def test_an_edit_of_the_card_during_a_push_survives_it(hub, client, scales, no_waits):
    def write(folder, *_):
        if 'person' not in card_text(hub):
            edit(card_text(hub) + 'A line of a person.\n')
        with (folder / 'README.md').open('a') as card:
            card.write('A line of ours.\n')

    push_folder(REPO, write, 'title')
    assert card_text(hub).endswith('A line of a person.\nA line of ours.\n')


def test_eight_pushes_at_once_lose_nothing(hub, client, scales):
    def push(number):
        def write(folder, *_):
            with (folder / 'README.md').open('a') as card:
                card.write(f'push {number}\n')

        return push_folder(REPO, write, 'title')

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(push, range(8)))) == 8
    assert sorted(card_text(hub).splitlines()[-8:]) == [f'push {number}' for number in range(8)]


@pytest.mark.parametrize('token', ['hf_' + 'x' * 34, 'odd token'])
def test_tokens_stay_out_of_errors(hub, client, token):
    hub.faults['/create'] = 500
    with pytest.raises(HubError) as caught:
        push_scales(random_scales(), f'ann/{token[:20].replace(" ", "-")}', token=token)
    assert token not in str(caught.value)


@pytest.mark.parametrize(
    'text',
    ['../../secret', 'ann/../..', '/etc', '', 'ann/tiny@', 'ann/tiny@../../main', 'ann/tiny@/etc/passwd'],
)
def test_a_source_cannot_lead_out_of_the_cache(client, text):
    with pytest.raises(ValueError):
        load_scales(f'hf-hub:{text}')


def test_scales_of_a_card_that_is_too_large_go_into_a_file_beside_it(hub, client, tmp_path):
    scales = random_scales().with_provenance({'dataset': 'cifar10'})
    save_scales_card(scales, tmp_path / 'small', REPO, scales_file=True)
    hub.readme_limit = (tmp_path / 'small' / 'README.md').stat().st_size + 500
    push_scales(scales, REPO)
    assert {'README.md', 'scales.safetensors'} < set(hub.repo(REPO).files())
    for offline in (False, True):
        client('other', offline=offline)
        assert load_scales(f'hf-hub:{REPO}') == scales
        assert load_scales(f'hf-hub:{REPO}').provenance == {'dataset': 'cifar10'}


def test_a_push_keeps_what_others_wrote_on_the_hub(hub, client, scales):
    HfApi().upload_file(path_or_fileobj=b'mine', path_in_repo='notes.txt', repo_id=REPO)
    edit(card_text(hub).replace('---\n', '---\nlicense: mit\n', 1) + 'A note.\n')
    update = random_scales()
    push_scales(update, REPO)
    card = ModelCard(card_text(hub))
    assert card.data.license == 'mit' and card.text.endswith('A note.\n')
    assert hub.repo(REPO).read('notes.txt') == b'mine'
    assert load_scales(f'hf-hub:{REPO}') == update


def test_a_wrong_endpoint_is_named(tmp_path):
    # The client reads the variable when it is imported.
    environment = {**os.environ, 'HF_ENDPOINT': 'nonsense', 'HF_HOME': str(tmp_path), 'HF_HUB_OFFLINE': '0'}
    command = [sys.executable, '-m', 'repopt_timm.cli', 'scales', 'show', f'hf-hub:{REPO}']
    assert 'HF_ENDPOINT' in subprocess.run(command, env=environment, capture_output=True, text=True).stderr


def test_the_client_logs_no_password():
    record = logging.makeLogRecord({'msg': 'HEAD %s, trying again', 'args': ('http://ann:s3cret@host/x',)})
    handlers = logging.getLogger('huggingface_hub').handlers
    assert handlers and all(handler.filter(record) for handler in handlers)
    assert record.getMessage() == 'HEAD http://***@host/x, trying again'
