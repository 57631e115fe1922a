import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from huggingface_hub import HfApi, ModelCard, constants

from repopt_timm import load_scales, push_scales, save_scales_card
from repopt_timm.cards import transfer
from repopt_timm.cards.card import eval_results
from repopt_timm.cards.format import encode_scales
from repopt_timm.cards.hub import HubError, HubFileNotFoundError, download, parse_hub_source, push_folder
from repopt_timm.cards.publish import write_card

from ..helpers import TINY, random_scales

REPO = 'ann/tiny'


@pytest.fixture
def scales(hub, client):
    """Scales that ann has published."""
    scales = random_scales()
    push_scales(scales, REPO)
    hub.requests.clear()
    return scales


def half_files(home):
    """Whatever a cache has of contents, whole or half."""
    return [path for path in home.glob('hub/models--*/*/**/*') if path.is_file() and 'refs' not in path.parts]


def test_scales_go_from_one_cache_into_another(hub, client, scales, tmp_path):
    assert set(hub.repo(REPO).files()) == {'.gitattributes', 'README.md', 'scales.png'}
    assert HfApi().model_info(REPO).card_data['repopt'] == encode_scales(scales)
    client('other', token=None)
    assert load_scales(f'hf-hub:{REPO}') == scales
    assert load_scales(f'hf-hub:{REPO}').source == f'hf-hub:{REPO}'
    assert not (tmp_path / 'home/hub/models--ann--tiny').exists()


def test_scales_reach_another_process(hub, scales, tmp_path):
    code = f"from repopt_timm import load_scales\nprint(load_scales('hf-hub:{REPO}').fingerprint)"
    env = {**os.environ, **hub.client_env(tmp_path / 'other')}
    run = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == scales.fingerprint


def test_what_is_pushed_is_what_is_saved(hub, client, scales, tmp_path):
    save_scales_card(scales, tmp_path / 'local', repo_id=REPO)
    saved = {file.name: file.read_bytes() for file in (tmp_path / 'local').iterdir()}
    assert {name: hub.repo(REPO).read(name) for name in saved} == saved


def test_a_push_keeps_what_others_wrote_on_the_hub(hub, client, scales):
    card = ModelCard.load(REPO)
    card.data.license, card.text = 'mit', f'{card.text}\nA note.\n'
    # `ModelCard.push_to_hub` of older clients asks the real Hub whether the card is valid.
    HfApi().upload_file(path_or_fileobj=str(card).encode(), path_in_repo='README.md', repo_id=REPO)
    update = random_scales()
    push_scales(update, REPO)
    card = ModelCard(hub.repo(REPO).read('README.md').decode())
    assert card.data.license == 'mit'
    assert card.text.endswith('A note.\n')
    assert load_scales(f'hf-hub:{REPO}') == update


def test_branches_and_pull_requests_are_separate(hub, client, scales):
    branch, pull = random_scales(), random_scales()
    push_scales(branch, REPO, revision='dev/1')
    client('other', token='hf_bob')
    address = push_scales(pull, REPO, create_pr=True)
    assert address == f'{hub.endpoint}/{REPO}/discussions/1'
    assert load_scales(f'hf-hub:{REPO}') == scales
    assert load_scales(f'hf-hub:{REPO}@dev/1') == branch
    assert load_scales(f'hf-hub:{REPO}@refs/pr/1') == pull
    commit = hub.repo(REPO).resolve('dev/1')
    assert load_scales(f'hf-hub:{REPO}@{commit}') == branch


def test_a_private_repository_is_for_its_owner(hub, client):
    scales = random_scales()
    push_scales(scales, 'ann/secret', private=True)
    assert hub.repo('ann/secret').meta['private']
    assert load_scales('hf-hub:ann/secret') == scales
    client('other', token=None)
    assert load_scales('hf-hub:ann/secret', token='hf_ann') == scales


@pytest.mark.parametrize(
    ('repo_id', 'file', 'revision', 'token', 'message'),
    [
        (
            'ann/none',
            'README.md',
            None,
            'hf_ann',
            r'hf-hub:ann/none, file README\.md: there is no such repository, or it',
        ),
        ('ann/secret', 'README.md', None, None, 'private and this token may not see it.*`hf auth login`'),
        ('ann/secret', 'README.md', None, 'hf_bob', 'private and this token may not see it.*`hf auth login`'),
        (REPO, 'none.txt', None, 'hf_ann', r'hf-hub:ann/tiny, file none\.txt: the repository has no such file'),
        (REPO, 'README.md', 'v9', 'hf_ann', 'hf-hub:ann/tiny@v9.*no such revision'),
        (REPO, 'README.md', None, 'hf_wrong', r'does not accept the token \(401\).*Log in again'),
    ],
)
def test_whatever_is_missing_is_named_with_the_next_step(client, scales, repo_id, file, revision, token, message):
    push_scales(scales, 'ann/secret', private=True)
    client('other', token)
    with pytest.raises(HubError, match=message) as caught:
        download(repo_id, file, revision)
    assert token is None or token not in str(caught.value)


def test_somebody_elses_repository_is_not_written_to(hub, client, scales):
    client('other', token='hf_bob')
    with pytest.raises(HubError, match=r'hf-hub:ann/tiny: this token may not do that \(403\)'):
        push_scales(random_scales(), REPO)
    client('other', token=None)
    with pytest.raises(HubError, match='`hf auth login`'):
        push_scales(random_scales(), REPO)
    assert load_scales(f'hf-hub:{REPO}') == scales


def test_a_download_that_breaks_off_is_resumed_or_leaves_nothing(hub, client, scales, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', 1 << 10)
    client('other')
    hub.drop_downloads('README.md', after=4000)
    assert load_scales(f'hf-hub:{REPO}') == scales
    client('third')
    hub.drop_downloads('README.md', after=4000, times=9, reset=True)
    with pytest.raises(HubError, match=r'hf-hub:ann/tiny, file README\.md: the connection to http.* failed'):
        load_scales(f'hf-hub:{REPO}')
    assert not half_files(tmp_path / 'third')
    hub.faults.clear()
    assert load_scales(f'hf-hub:{REPO}') == scales


def test_offline_needs_a_filled_cache(hub, client, scales):
    load_scales(f'hf-hub:{REPO}')
    hub.requests.clear()
    client(offline=True)
    assert load_scales(f'hf-hub:{REPO}') == scales
    client('empty', offline=True)
    with pytest.raises(
        HubError, match=r'ann/tiny, file README\.md is not in the cache.*`hf download ann/tiny README\.md'
    ):
        load_scales(f'hf-hub:{REPO}')
    with pytest.raises(HubError, match='HF_HUB_OFFLINE=1'):
        push_scales(scales, REPO)
    assert not hub.requests


def test_offline_knows_of_files_that_are_not_there(hub, client, scales):
    for offline in (False, True):
        client(offline=offline)
        with pytest.raises(
            HubFileNotFoundError, match=r'hf-hub:ann/tiny, file none\.txt: the repository has no such file'
        ):
            download(REPO, 'none.txt')


def test_a_card_that_is_too_large_is_told_its_size(hub, client, scales):
    hub.readme_limit = 2000
    with pytest.raises(
        HubError, match=r'hf-hub:ann/tiny: the Hub refuses the card README\.md of \d{4} bytes .*\(413\)'
    ):
        push_scales(random_scales(), REPO)
    assert load_scales(f'hf-hub:{REPO}') == scales


ANSWERS = {
    400: r'the Hub refuses that \(400\): .*Mend what it names',
    401: r'the Hub does not accept the token \(401\)\. Log in again',
    403: r'this token may not do that \(403\)\. Use one with write access to ann/tiny',
    412: r'others went on changing the branch \(412\).*push again when they have finished',
    413: r'the Hub refuses the card README\.md of \d+ bytes as too large \(413\)',
    500: r'the Hub answers 500: .*a problem of the Hub: try again later',
}


def test_each_answer_to_a_push_has_its_own_next_step(hub, client, scales, monkeypatch):
    monkeypatch.setattr(transfer, '_FIRST_WAIT', 0)
    for status, message in ANSWERS.items():
        hub.faults.clear()
        hub.fail_requests(status, times=99, pattern='/commit/')
        with pytest.raises(HubError, match=f'hf-hub:ann/tiny: {message}') as caught:
            push_folder(REPO, lambda folder, *_: (folder / 'new.txt').touch(), 'title')
        assert caught.value.status == status
    assert load_scales(f'hf-hub:{REPO}') == scales


def test_a_download_that_is_forbidden_is_not_called_a_network_problem(hub, client, scales):
    client('other')
    hub.fail_requests(403, times=9, pattern='/resolve/')
    with pytest.raises(HubError, match=r'README\.md: this token may not read it \(403\).*read access to ann/tiny'):
        load_scales(f'hf-hub:{REPO}')


def test_an_edit_of_the_card_during_a_push_survives_it(hub, client, scales, monkeypatch):
    monkeypatch.setattr(transfer, '_FIRST_WAIT', 0)
    edited = []

    def write(folder, name, files, too_large):
        if not edited:
            card = hub.repo(REPO).read('README.md') + b'A line of a person.\n'
            edited.append(HfApi().upload_file(path_or_fileobj=card, path_in_repo='README.md', repo_id=REPO))
        write_card(folder, name, TINY, None, eval_results({'dataset': 'digits', 'top1': 90}), published=files)

    push_folder(REPO, write, 'Results')
    card = ModelCard(hub.repo(REPO).read('README.md').decode())
    assert card.text.endswith('A line of a person.\n')
    assert [result.metric_value for result in card.data.eval_results] == [90]
    assert load_scales(f'hf-hub:{REPO}') == scales


def test_eight_pushes_at_once_lose_nothing(hub, client, monkeypatch):
    monkeypatch.setattr(transfer, '_FIRST_WAIT', 0.02)

    def push(number):
        results = eval_results({'dataset': f'data{number}', 'top1': 90 + number})
        return push_folder(
            REPO, lambda folder, name, *_: write_card(folder, name, TINY, None, results), f'push {number}'
        )

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(push, range(8)))) == 8
    card = ModelCard(hub.repo(REPO).read('README.md').decode())
    assert {result.metric_value for result in card.data.eval_results} == set(range(90, 98))


def test_a_tampered_card_on_the_hub_is_refused(hub, client, scales):
    card = ModelCard.load(REPO)
    card.data['repopt']['architecture'] = 'other'
    HfApi().upload_file(path_or_fileobj=str(card).encode(), path_in_repo='README.md', repo_id=REPO)
    with pytest.raises(ValueError, match='hf-hub:ann/tiny'):
        load_scales(f'hf-hub:{REPO}')


@pytest.mark.parametrize('token', ['hf_' + 'x' * 34, 'odd token'])
def test_tokens_stay_out_of_errors(hub, client, token):
    hub.fail_requests(500, pattern='/create')
    with pytest.raises(HubError) as caught:
        push_scales(random_scales(), f'ann/{token[:20].replace(" ", "-")}', token=token)
    assert token not in str(caught.value)
    assert not any(token in str(request) for request in hub.requests)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('ann/tiny', 'expected hf-hub:user/repo'),
        ('hf-hub:ann/tiny@', "names no revision after the '@'"),
        ('hf-hub:../../secret', 'is not the name of a repository'),
        ('hf-hub:ann/../..', 'is not the name of a repository'),
        ('hf-hub:/etc', 'is not the name of a repository'),
        ('hf-hub:', 'is not the name of a repository'),
        ('hf-hub:ann/tiny@../../main', 'is not the name of a revision'),
        ('hf-hub:ann/tiny@/etc/passwd', 'is not the name of a revision'),
        ('hf-hub:ann/tiny@a@b', 'is not the name of a revision'),
    ],
)
def test_a_source_cannot_lead_out_of_the_cache(text, message):
    with pytest.raises(ValueError, match=message):
        parse_hub_source(text)


def test_sources_are_parsed():
    assert parse_hub_source('hf-hub:ann/tiny') == ('ann/tiny', None)
    assert parse_hub_source('hf-hub:ann/tiny@refs/pr/1') == ('ann/tiny', 'refs/pr/1')
    assert str(parse_hub_source('hf-hub:ann/tiny@v1.0')) == 'hf-hub:ann/tiny@v1.0'


def test_scales_of_a_card_that_is_too_large_go_into_a_file_beside_it(hub, client, tmp_path):
    scales = random_scales().with_provenance({'dataset': 'cifar10'})
    save_scales_card(scales, tmp_path / 'small', REPO, scales_file=True)
    save_scales_card(scales, tmp_path / 'large', REPO)
    small, large = ((tmp_path / name / 'README.md').stat().st_size for name in ('small', 'large'))
    hub.readme_limit = (small + large) // 2
    push_scales(scales, REPO)
    assert set(hub.repo(REPO).files()) == {'.gitattributes', 'README.md', 'scales.png', 'scales.safetensors'}
    entry = HfApi().model_info(REPO).card_data['repopt']
    assert entry == encode_scales(scales, scales_file=True)
    assert entry['provenance'] == {'dataset': 'cifar10'}
    assert 'modules' not in entry
    client('other')
    found = load_scales(f'hf-hub:{REPO}')
    assert found == scales
    assert found.provenance == {'dataset': 'cifar10'}
    client('other', offline=True)
    assert load_scales(f'hf-hub:{REPO}') == scales
    client()
    # What was put beside the card stays there, also when the Hub would take more.
    hub.readme_limit = 10 * large
    update = random_scales()
    push_scales(update, REPO)
    assert 'modules' not in HfApi().model_info(REPO).card_data['repopt']
    client('third')
    assert load_scales(f'hf-hub:{REPO}') == update
