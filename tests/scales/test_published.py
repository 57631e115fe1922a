import hashlib
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
import torch

from repopt_timm import Scales, load_scales, push_scales
from repopt_timm.cli import main
from repopt_timm.scales import published
from repopt_timm.scales.published import PublishedScales, find_published, published_table
from repopt_timm.sources import default_scales

from ..helpers import TINY, random_scales, tiny_model
from .test_files import reference_keys

NAME = f'{TINY}.published'


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        self.server.answers += 1


@pytest.fixture
def server(tmp_path, monkeypatch, client):
    """Serves stand-ins in the place of GitHub, to a client with an empty cache."""
    (tmp_path / 'github').mkdir()
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Handler, directory=tmp_path / 'github')) as server:
        server.answers = 0
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        monkeypatch.setattr(published, 'ADDRESS', f'http://127.0.0.1:{server.server_port}')
        yield server
        server.shutdown()


@pytest.fixture
def file(server, tmp_path):
    """The file of a repository, with scales that somebody has published for the tiny model."""
    path = tmp_path / 'github/ann/repo/0123/tiny-scales.pth'
    path.parent.mkdir(parents=True)
    torch.save(reference_keys(random_scales()), path)
    return path


@pytest.fixture
def scales(file, monkeypatch):
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    row = PublishedScales(NAME, file.name, 'ann/repo', '0123', digest, 'mit', 'CIFAR-100', '240')
    monkeypatch.setitem(published_table(), NAME, row)
    return load_scales(file, tiny_model())


def test_the_table_names_networks_and_their_files():
    assert all(name == row.name and timm.is_model(row.network) for name, row in published_table().items())
    assert find_published('repopt_vgg_b1_hs').file == 'RepOpt-VGG-B1-scales.pth'
    assert find_published('repghostnet_050').file == 'RepOptGhostNet_0_5x_scales.pth'
    assert find_published('repopt_vgg_a0') is None


def test_published_scales_are_downloaded_once_and_name_their_source_and_licence(server, scales, tmp_path, client):
    found = Scales.from_model(timm.create_model(TINY, scales='published'))
    assert found == scales and found.provenance['license'] == 'mit'
    assert found.provenance['source'] == 'https://github.com/ann/repo/blob/0123/tiny-scales.pth'
    assert load_scales(NAME).provenance == found.provenance
    client(offline=True)
    assert load_scales('published', tiny_model('_hs')) == scales
    assert server.answers == 1
    # A file that was changed in the cache is downloaded again.
    client()
    next((tmp_path / 'home').rglob('tiny-scales.pth')).write_bytes(b'changed')
    assert load_scales(NAME, tiny_model()) == scales


def test_what_cannot_be_downloaded_is_said_in_one_line_and_leaves_nothing(file, scales, tmp_path, client):
    for change, message in (
        (lambda: client(offline=True), 'HF_HUB_OFFLINE'),
        (client, 'hash'),
        (file.unlink, '404'),
    ):
        file.write_bytes(b'changed')
        change()
        with pytest.raises(OSError, match=f'{NAME}.*{message}'):
            load_scales(NAME)
    assert not [path for path in (tmp_path / 'home').rglob('*') if path.is_file()]


def test_a_target_without_scales_of_its_own_is_told_of_published_ones(scales):
    with pytest.raises(ValueError, match='--scales published'):
        default_scales(TINY)
    other = timm.create_model('resnet18', device='meta')
    with pytest.raises(ValueError, match=r"'resnet18'.*test_repopt_vgg"):
        load_scales('published', other)
    with pytest.raises(ValueError, match=f'scales of {TINY}'):
        load_scales(NAME, other)


def test_a_list_names_what_ships_what_is_published_and_what_is_cached(scales, client, capsys):
    def listed():
        assert main(['scales', 'list', '--json']) == 0
        return {row['name']: row['where'] for row in json.loads(capsys.readouterr().out)['scales']}

    assert {'repopt_vgg_a0.cifar10': 'ships', NAME: 'published'}.items() <= listed().items()
    load_scales(NAME)
    push_scales(scales, 'ann/tiny')
    push_scales(scales, 'ann/other', license='my-licence')
    load_scales('hf-hub:ann/tiny')
    after = listed()
    assert {NAME: 'published, cached', 'hf-hub:ann/tiny': 'cached'}.items() <= after.items()
    assert 'hf-hub:ann/other' not in after
