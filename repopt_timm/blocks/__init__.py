"""Plain twins of timm's structurally re-parameterized networks: one file for each family of blocks."""

from .plain_block import PlainBlock
from .plain_twin import BlockReport, plain_state_dict, plain_twin, report_twin

__all__ = ['BlockReport', 'PlainBlock', 'plain_state_dict', 'plain_twin', 'report_twin']
