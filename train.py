#!/usr/bin/env python3
"""Trains from a checkout, as `repopt-timm train` does from an installed package."""

import sys

from repopt_timm.cli import main

if __name__ == '__main__':
    sys.exit(main(['train', *sys.argv[1:]]))
