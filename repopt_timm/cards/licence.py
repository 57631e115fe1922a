"""The licence of a card: what it states already, what its author gives, or what is known of its content."""

import logging
from collections.abc import Mapping
from typing import Any

from ..weights_origin import license_identifier

_logger = logging.getLogger(__name__)

# hf.co/docs/hub/repositories-licenses; any other is `other`, with a name.
_KNOWN_TO_HUB = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
eupl-1.1 gemma gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 lppl-1.3c mit mpl-2.0 ms-pl ncsa
odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
"""
HUB_LICENSES = frozenset(_KNOWN_TO_HUB.split())


def checked_license(name: str | None) -> str:
    """Returns the identifier of a licence that somebody gives, in lower case; empty for none."""
    if name and not license_identifier(name):
        raise ValueError(f"The licence is {name!r:.80}, expected an identifier such as 'apache-2.0' or 'my-license'.")
    return license_identifier(name)


def stated_license(metadata: Mapping[str, Any]) -> str:
    """Returns the licence that the metadata of a card state, by its own name; empty if they state none."""
    stated = metadata.get('license') or ''
    if stated == 'other':
        stated = metadata.get('license_name') or stated
    return ', '.join(map(str, stated)) if isinstance(stated, list) else str(stated)


def choose_license(card: str, stated: str, given: str, known: str) -> str:
    """Returns the licence of a card, empty if there is none, and warns if the three that it may have differ."""
    chosen = stated or given or known
    if not chosen:
        _logger.warning(f'The card of {card} states no licence, as none is known. Give one with --license (license=).')
    for other, whose in ((given, 'the given one'), (known, 'that of its content')):
        if other and other.lower() != chosen.lower():
            _logger.warning(
                f'The card of {card} states the licence {chosen}, but {whose} is {other}: mend `license` in it.'
            )
    return chosen
