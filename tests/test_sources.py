import json
import re

import pytest
import torch

from repopt_timm import Scales, load_scales
from repopt_timm.cli import main

from .helpers import TINY, random_scales, tiny_model


def test_a_mapping_is_taken_by_name_and_a_source_that_is_nowhere_is_named():
    scales = random_scales()
    assert load_scales(dict(scales), tiny_model()) == scales
    with pytest.raises(FileNotFoundError, match=r"'missing\.safetensors'"):
        tiny_model(scales='missing.safetensors')
    for source in ('initial', 'published', 'implied'):
        with pytest.raises(ValueError, match=f"scales='{source}'"):
            load_scales(source)


def test_a_folder_without_a_card_has_its_file_of_scales(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        load_scales(tmp_path)
    random_scales().save(tmp_path / 'scales.safetensors')
    for text in (None, 'A card of weights alone.'):
        if text:
            (tmp_path / 'README.md').write_text(text)
        assert load_scales(tmp_path) == load_scales(tmp_path / 'scales.safetensors')


@pytest.mark.parametrize('out', ['file.safetensors', 'card'])
def test_extract_writes_any_source_to_a_file_or_a_card(tmp_path, out, capsys):
    checkpoint = tmp_path / 'last.pth.tar'
    torch.save({'state_dict': tiny_model('_hs', scales=random_scales()).state_dict(), 'arch': f'{TINY}_hs'}, checkpoint)
    assert main(['scales', 'extract', str(checkpoint), str(tmp_path / out), '--json']) == 0
    found = load_scales(tmp_path / out)
    assert found == load_scales(checkpoint)
    assert json.loads(capsys.readouterr().out)['fingerprint'] == found.fingerprint
    assert main(['scales', 'extract', str(tmp_path / out), str(tmp_path / 'again'), '--scales-file']) == 0
    assert main(['scales', 'plot', str(tmp_path / out), str(tmp_path / 'scales.png')]) == 0
    assert load_scales(tmp_path / 'again/scales.safetensors') == found
    # It would say nothing of the licence.
    assert main(['scales', 'extract', str(tmp_path / out), str(tmp_path / 'x.safetensors'), '--license', 'mit']) == 1


def test_show_says_how_far_scales_are_from_their_initial_values(tmp_path, capsys):
    random_scales().with_provenance({'dataset': 'digits'}).save(tmp_path / 'x.safetensors')
    assert main(['scales', 'show', str(tmp_path / 'x.safetensors')]) == 0
    shown = capsys.readouterr().out
    assert 'digits' in shown and 'layer means moved by' in shown and 'stage 4' in shown
    assert main(['scales', 'show', 'initial', '--architecture', TINY, '--json']) == 0
    shown = json.loads(capsys.readouterr().out)
    assert 'moved by 0.0%' in shown['movement'] and len(shown['stages']) == 12
    # A network of timm's, and one unknown to it.
    for network, known in (('resnet18', True), ('nonesuch', False)):
        Scales(network, {'conv1': {'kxk': torch.ones(64)}}).save(tmp_path / 'x.safetensors')
        assert main(['scales', 'show', str(tmp_path / 'x.safetensors'), '--json']) == 0
        assert ('movement' in json.loads(capsys.readouterr().out)) == known
