import os
import resource

import pytest
import torch
from safetensors.torch import save_file

from repopt_timm.files import check_output, check_output_folder, replacing, write_text


def test_an_error_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / 'file.txt'
    write_text(path, 'old')
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text('half of the n')
        raise RuntimeError
    assert path.read_text() == 'old'
    assert os.listdir(tmp_path) == ['file.txt']


def test_a_new_file_has_the_permissions_of_any_other_and_a_link_stays(tmp_path):
    (tmp_path / 'ordinary').touch()
    (tmp_path / 'link').symlink_to('file')
    write_text(tmp_path / 'link', 'new')
    assert (tmp_path / 'link').is_symlink() and (tmp_path / 'file').read_text() == 'new'
    assert (tmp_path / 'file').stat().st_mode == (tmp_path / 'ordinary').stat().st_mode


def test_an_output_is_a_regular_file_that_is_not_an_input(tmp_path):
    (tmp_path / 'input').write_text('input')
    (tmp_path / 'link').symlink_to('input')
    os.link(tmp_path / 'input', tmp_path / 'hard_link')
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'link_to_device').symlink_to(os.devnull)
    for name in ('input', 'link', 'hard_link', 'pipe', 'link_to_device', '.', 'input/new'):
        with pytest.raises(ValueError, match=f"{name}' cannot be written"):
            check_output(tmp_path / name, 'no file', tmp_path / 'input')
    for name in ('input', 'input/new'):
        with pytest.raises(ValueError, match=f"{name}' cannot be written"):
            check_output_folder(tmp_path / name)
    for check in (check_output, check_output_folder):
        assert check(tmp_path / 'new/folder/file') == tmp_path / 'new/folder/file'
    with pytest.raises(ValueError, match='pipe'):
        write_text(tmp_path / 'pipe', '')


def test_a_full_disk_is_named_with_the_file(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        for write in (lambda to: to.write_bytes(bytes(1000)), lambda to: save_file({'a': torch.ones(1000)}, to)):
            with pytest.raises(OSError, match=r"file\.txt'.*File too large"), replacing(tmp_path / 'file.txt') as path:
                write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []
