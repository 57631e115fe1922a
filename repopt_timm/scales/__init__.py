"""Searched scales: the type that holds them, the files they come from, summaries of them."""

from .files import read_scale_file
from .scales import Scales
from .summary import scales_table

__all__ = ['Scales', 'read_scale_file', 'scales_table']
