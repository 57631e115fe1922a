"""Is it training right? Versions and devices, the method's equivalence on this machine, and what a run has left."""

from .equivalence_check import check_equivalence
from .run_check import Finding, check_run

__all__ = ['Finding', 'check_equivalence', 'check_run']
