"""Access tokens and passwords, which no log, card or error text may show."""

import re

__all__ = ['scrub']

_TOKEN = re.compile(r'\bhf_(?:oauth_|jwt_)?[A-Za-z0-9]{20,}')
# The part of an address with a user's name and password.
_CREDENTIALS = re.compile(r'(?<=://)[^\s/?#]+@')


def scrub(text: str, *tokens: str | bool | None) -> str:
    """Replaces access tokens of the Hugging Face Hub by `hf_***`, and user and password in an address by `***`.

    Args:
        text: Any text.
        tokens: Tokens that are in use, replaced whatever they look like; others are recognized by their form.
    """
    for token in tokens:
        if isinstance(token, str) and token:
            text = text.replace(token, 'hf_***')
    return _CREDENTIALS.sub('***@', _TOKEN.sub('hf_***', text))
