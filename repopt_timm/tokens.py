"""Access tokens and passwords, which no log, card or error text may show."""

import re


def scrub(text: str, token: str | None = None) -> str:
    """Replaces user and password in an address by `***`, and `token` and what looks like a token by `hf_***`."""
    if token:
        text = text.replace(token, 'hf_***')
    return re.sub(r'(?<=://)[^\s/?#]+@', '***@', re.sub(r'\bhf_(?:oauth_|jwt_)?[A-Za-z0-9]{20,}', 'hf_***', text))
