"""Files that ship with the package: `configs/` and `pretrained/`."""

from pathlib import Path

__all__ = ['resource_dir']


def resource_dir(name: str) -> Path:
    """Returns a folder of shipped files: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name
