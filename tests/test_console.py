import errno
import io
import sys

import pytest

from repopt_timm.console import exit_code


def raising(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    ('error', 'line'),
    [
        (ValueError('two\n  lines'), 'error: two lines\n'),
        (KeyError('step'), "error: KeyError: 'step'."),
        (RuntimeError(), 'error: RuntimeError: no message.'),
        (ValueError('x is refused: Weights only load failed. Set `weights_only` to False.'), 'error: x is refused'),
        (
            ValueError("Caught.\nOriginal Traceback (most recent call last):\n  x\nValueError: the image 'a' is bad"),
            "error: the image 'a' is bad\n",
        ),
        # A pipe that breaks elsewhere than at the output.
        (BrokenPipeError('the socket of a worker'), 'error: the socket of a worker\n'),
        (OSError('http://ann:secret@hub.example:80/a failed'), 'error: http://***@hub.example:80/a failed\n'),
        (OSError('https://secret@hub.example failed'), 'error: https://***@hub.example failed\n'),
        (OSError('hf_abcdefghijklmnopqrstuvwxyz is refused'), 'error: hf_*** is refused\n'),
        (OSError('ann@hub.example wrote https://a.b/c@d'), 'error: ann@hub.example wrote https://a.b/c@d\n'),
    ],
)
def test_an_error_is_one_line_without_passwords_and_tokens(capsys, error, line):
    assert exit_code(raising(error)) == 1
    told = capsys.readouterr().err
    assert told.count('\n') == 1
    assert told.startswith(line)
    assert 'weights_only' not in told


def test_a_token_of_other_characters_is_named(capsys, monkeypatch):
    monkeypatch.setattr('repopt_timm.errors.get_token', lambda: 'hf_\u00e9')
    assert exit_code(lambda: 'hf_\u00e9'.encode('ascii')) == 1
    assert 'HF_TOKEN' in capsys.readouterr().err


def test_ctrl_c_has_the_exit_code_of_shells_and_debug_shows_the_traceback_of_an_error(capsys):
    assert exit_code(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == 'Interrupted.\n'
    with pytest.raises(KeyError):
        exit_code(raising(KeyError('step')), debug=True)


def test_a_reader_that_ends_early_ends_the_command_without_a_word(capsys, monkeypatch):
    class Closed(io.StringIO):
        def flush(self):
            raise BrokenPipeError(errno.EPIPE, 'Broken pipe')

    monkeypatch.setattr(sys, 'stdout', Closed())
    assert exit_code(lambda: print('a line')) == 141
    # The interpreter's last flush would complain.
    assert sys.stdout is None
    assert capsys.readouterr().err == ''
