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


def test_a_new_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / 'ordinary').touch()
    write_text(tmp_path / 'replaced', '')
    assert (tmp_path / 'replaced').stat().st_mode == (tmp_path / 'ordinary').stat().st_mode


def test_an_output_is_a_regular_file_that_is_not_an_input(tmp_path):
    (tmp_path / 'input').write_text('input')
    (tmp_path / 'link').symlink_to('input')
    os.link(tmp_path / 'input', tmp_path / 'hard_link')
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'link_to_device').symlink_to(os.devnull)
    for name, message in (
        ('input', 'is the input itself'),
        ('link', 'is the input itself'),
        ('hard_link', 'is the input itself'),
        ('pipe', 'is a device or a pipe'),
        ('link_to_device', 'is a device or a pipe'),
        ('.', 'is a folder'),
        ('input/new', "input' is not a folder"),
    ):
        with pytest.raises(ValueError, match=f"{name}' cannot be written: .*{message}"):
            check_output(tmp_path / name, 'no file', tmp_path / 'input')
    assert check_output(tmp_path / 'new' / 'folder' / 'file') == tmp_path / 'new' / 'folder' / 'file'


def test_a_file_that_is_written_stays_what_it_was(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(ValueError, match="pipe' cannot be written: it is a device or a pipe"):
        write_text(tmp_path / 'pipe', '')
    # Also if what it points to does not exist yet.
    (tmp_path / 'link').symlink_to('file')
    write_text(tmp_path / 'link', 'new')
    assert (tmp_path / 'link').is_symlink()
    assert (tmp_path / 'file').read_text() == 'new'


def test_a_folder_is_not_made_inside_of_a_file(tmp_path):
    (tmp_path / 'file').touch()
    for name in ('file', 'file/new'):
        with pytest.raises(ValueError, match=f"{name}' cannot be written: '.*file' is not a folder"):
            check_output_folder(tmp_path / name)
    assert check_output_folder(tmp_path / 'new' / 'folder') == tmp_path / 'new' / 'folder'


def test_a_full_disk_is_named_with_the_file(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        for write in (
            lambda path: path.write_bytes(bytes(1000)),
            lambda path: save_file({'a': torch.ones(1000)}, path),
        ):
            with (
                pytest.raises(OSError, match=r"'.*/file\.txt' cannot be written: .*File too large"),
                replacing(tmp_path / 'file.txt') as temporary,
            ):
                write(temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []
