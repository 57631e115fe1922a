"""What training and search cost: the `repopt-timm bench` commands."""

from .bench_commands import add_commands

__all__ = ['add_commands']
