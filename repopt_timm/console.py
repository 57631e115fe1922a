"""How a command ends: errors as one line, and the exit code."""

import sys
from collections.abc import Callable

__all__ = ['exit_code']


def exit_code(run: Callable[[], None], debug: bool = False) -> int:
    """Runs a command, and prints an error as one line.

    Args:
        run: The command.
        debug: Let errors through, for their traceback.

    Returns:
        The exit code: 0; 1 after an error; 130 after Ctrl-C.
    """
    try:
        run()
    except KeyboardInterrupt:
        print('Interrupted.', file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        print(f'error: {_one_line(error)}', file=sys.stderr)
        return 1
    return 0


def _one_line(error: Exception) -> str:
    text = str(error)
    if 'Original Traceback' in text:
        # An error in a loader's worker: its own line is the last.
        text = text.rstrip().rsplit('\n', 1)[-1].partition(': ')[2]
    if 'weights_only' in text:
        # torch advises to switch the check off.
        start = text.partition('Weights only')[0] if 'Weights only' in text else ''
        text = f'{start}it cannot be read without running code from it. Save its tensors alone and load those.'
    line = ' '.join(text.split())
    if isinstance(error, ValueError | OSError | ImportError) and line:
        return line
    name = type(error).__name__
    return f'{name}: {line or "no message"}. This was not foreseen: run the command with --debug for the traceback.'
