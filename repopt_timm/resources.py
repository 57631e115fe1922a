"""Files that ship with the package: `configs/` and `pretrained/`."""

from pathlib import Path


def resource_dir(name: str) -> Path:
    """Returns a folder of shipped files: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def shipped_repositories() -> dict[str, Path]:
    """Returns the folders `pretrained/<model>.<tag>`, each one the content of a Hub repository, by name."""
    folders = sorted(resource_dir('pretrained').glob('*.*/'))
    return {folder.name: folder for folder in folders if (folder / 'README.md').is_file()}
