"""Errors that say what a user gave, in one line and without secrets."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError

from huggingface_hub import get_token

# What libraries raise over a bad argument or a damaged file.
_FOREIGN = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, JSONDecodeError, UnicodeDecodeError)


def scrub(text: str, token: str | None = None) -> str:
    """Replaces user and password in an address by `***`, and `token` and what looks like a token by `hf_***`."""
    # One that was read from a file may end its line.
    if token := (token or '').strip():
        text = text.replace(token, 'hf_***')
    return re.sub(r'(?<=://)[^\s/?#]+@', '***@', re.sub(r'\bhf_(?:oauth_|jwt_)?[A-Za-z0-9]{20,}', 'hf_***', text))


@contextmanager
def explaining(what: str) -> Iterator[None]:
    """Turns what libraries raise over a bad argument into a ValueError that begins with `what`."""
    try:
        yield
    except _FOREIGN as error:
        raise ValueError(f'{what}: {" ".join(str(error).split()) or type(error).__name__}') from error


def reason_of(error: BaseException) -> str:
    """Returns what an error says, on one line of 300 characters at most, without secrets; its type if it is empty."""
    return scrub(' '.join(str(error).split()))[:300].rstrip('.') or type(error).__name__


def one_line(error: BaseException) -> str:
    """Returns what an error says on one line, without passwords and access tokens; its type if it was not foreseen."""
    text = str(error)
    if isinstance(error, UnicodeEncodeError) and not (get_token() or '').isascii():
        text = 'The access token has characters that no token has: copy it again, into HF_TOKEN or by `hf auth login`.'
    if 'Original Traceback' in text:
        # An error in a loader's worker: its own line is the last.
        text = text.rstrip().rsplit('\n', 1)[-1].partition(': ')[2]
    if 'weights_only' in text:
        # torch advises to switch the check off.
        start = text.partition('Weights only')[0] if 'Weights only' in text else ''
        text = f'{start}it cannot be read without running code from it. Save its tensors alone and load those.'
    line = scrub(' '.join(text.split()))
    if isinstance(error, ValueError | OSError | ImportError) and line:
        return line
    return f'{type(error).__name__}: {line or "no message"}. This was not foreseen: --debug shows the traceback.'
