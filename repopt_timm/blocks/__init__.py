"""Plain twins of timm's structurally re-parameterized networks.

Read `readers`, `conversion`, `recalibration`.
"""

from .conversion import PlainBlock, implied_scales, plain_twin, report_twin
from .recalibration import recalibrate
