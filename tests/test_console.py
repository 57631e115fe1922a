import errno
import io
import sys

import pytest

from repopt_timm.console import exit_code
from repopt_timm.train.run_folder import run_folder


def raising(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    ('error', 'line'),
    [
        (ValueError('two\n  lines'), 'error: two lines'),
        (KeyError('step'), "error: KeyError: 'step'. This was not foreseen: run the command with --debug"),
        (RuntimeError(), 'error: RuntimeError: no message. This was not foreseen'),
        (
            ValueError('bad.pth is refused: Weights only load failed. Set `weights_only` to False.'),
            'bad.pth is refused',
        ),
        (
            ValueError("Caught.\nOriginal Traceback (most recent call last):\n  x\nValueError: the image 'a' is bad"),
            "error: the image 'a' is bad",
        ),
    ],
)
def test_an_error_is_one_line(capsys, error, line):
    assert exit_code(raising(error)) == 1
    told = capsys.readouterr().err
    assert told.count('\n') == 1
    assert line in told
    assert 'weights_only' not in told


@pytest.mark.parametrize(
    ('text', 'shown'),
    [
        ('http://ann:secret@hub.example:80/a failed', 'http://***@hub.example:80/a failed'),
        ('https://secret@hub.example failed', 'https://***@hub.example failed'),
        ('hf_abcdefghijklmnopqrstuvwxyz is refused', 'hf_*** is refused'),
        ('ann@hub.example wrote https://hub.example/a@b', 'ann@hub.example wrote https://hub.example/a@b'),
    ],
)
def test_an_error_has_no_password_and_no_token(capsys, text, shown):
    assert exit_code(raising(OSError(text))) == 1
    assert capsys.readouterr().err == f'error: {shown}\n'


def test_a_token_of_other_characters_is_named(capsys, monkeypatch):
    monkeypatch.setattr('repopt_timm.errors.get_token', lambda: 'hf_\u00e9')
    assert exit_code(lambda: 'hf_\u00e9'.encode('ascii')) == 1
    assert 'HF_TOKEN' in capsys.readouterr().err


def test_debug_shows_the_traceback_of_an_error():
    with pytest.raises(KeyError):
        exit_code(raising(KeyError('step')), debug=True)


def test_ctrl_c_has_the_exit_code_of_shells(capsys):
    assert exit_code(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == 'Interrupted.\n'
    assert exit_code(lambda: None) == 0


def test_a_reader_that_ends_early_ends_the_command_without_a_word(capsys, monkeypatch):
    class Closed(io.StringIO):
        def flush(self):
            raise BrokenPipeError(errno.EPIPE, 'Broken pipe')

    monkeypatch.setattr(sys, 'stdout', Closed())
    assert exit_code(lambda: print('a line')) == 141
    # The interpreter's last flush would complain.
    assert sys.stdout is None
    assert capsys.readouterr().err == ''


def test_a_pipe_that_breaks_elsewhere_is_an_error(capsys):
    assert exit_code(raising(BrokenPipeError('the socket of a worker'))) == 1
    assert 'the socket of a worker' in capsys.readouterr().err


def test_an_unforeseen_error_in_a_run_names_its_log(capsys, tmp_path):
    def run():
        with run_folder(tmp_path):
            (tmp_path / 'summary.csv').touch()
            raise KeyError('step')

    assert exit_code(run) == 1
    assert f'the log of the run is {tmp_path / "summary.csv"}.' in capsys.readouterr().err
