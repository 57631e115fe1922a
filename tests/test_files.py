import os

import pytest

from repopt_timm.files import replacing, write_text


def test_an_error_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / 'file.txt'
    write_text(path, 'old')
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text('half of the n')
        raise RuntimeError
    assert path.read_text() == 'old'
    assert os.listdir(tmp_path) == ['file.txt']


def test_a_new_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / 'ordinary').touch()
    write_text(tmp_path / 'replaced', '')
    assert (tmp_path / 'replaced').stat().st_mode == (tmp_path / 'ordinary').stat().st_mode
