"""Searched scales: the type that holds them, and the files they come from."""

from .scales import Scales

__all__ = ['Scales']
