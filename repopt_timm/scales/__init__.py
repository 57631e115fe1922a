"""Searched scales: the files that they come from, and summaries of them."""

from ..reparam import Scales
from .scale_files import read_scale_file
from .summary import scales_table

__all__ = ['Scales', 'read_scale_file', 'scales_table']
