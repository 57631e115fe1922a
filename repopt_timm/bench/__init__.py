"""What training and search cost: the `repopt-timm bench` commands."""

from .arguments import add_bench_commands

__all__ = ['add_bench_commands']
