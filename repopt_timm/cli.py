"""The command line, `repopt-timm`."""

import sys
from collections.abc import Sequence

from .train.main import main as train_main

__all__ = ['main']


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `repopt-timm`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ['train']:
            train_main(argv[1:])
        elif argv[:1] == ['quickstart']:
            train_main(['-c', 'quickstart', *argv[1:]])
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
