"""Is it training right? The method's equivalence on this machine, for a model of the user's."""

from .doctor_command import check_equivalence

__all__ = ['check_equivalence']
