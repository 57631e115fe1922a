"""Searched scales: the type that holds them, the files they come from, a table of them."""

from ..reparam import Scales
from .scale_files import read_scale_file
from .table import scales_table

__all__ = ['Scales', 'read_scale_file', 'scales_table']
