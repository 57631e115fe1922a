"""Plain twins of timm's structurally re-parameterized networks.

Read `readers`, `conversion`, `recalibration`.
"""

from .conversion import BlockReport, PlainBlock, implied_scales, plain_twin, report_twin
from .recalibration import recalibrate

__all__ = ['BlockReport', 'PlainBlock', 'implied_scales', 'plain_twin', 'recalibrate', 'report_twin']
