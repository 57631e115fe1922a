"""What commands print."""

import argparse
import json
from typing import Any

__all__ = ['tell']


def tell(args: argparse.Namespace, values: dict[str, Any], text: str) -> None:
    """Prints a result: with `--json` its values, for programs, and a text otherwise."""
    print(json.dumps(values, indent=2) if args.json else text)
