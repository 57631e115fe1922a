"""scikit-learn's handwritten digits as an image folder: 1,797 real images that need no download."""

from pathlib import Path

from ..files import replacing

__all__ = ['write_digits']

_DONE = 'complete'


def write_digits(root: str | Path) -> None:
    """Writes the images as `train/<digit>/<index>.png` and `validation/...`, every fourth image for validation.

    Args:
        root: Folder to write to; nothing happens if the images are there already.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    from PIL import Image

    root = Path(root)
    if (root / _DONE).exists():
        return
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("The digits need scikit-learn: pip install 'repopt-timm[quickstart]'.") from None
    digits = load_digits()
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target)):
        split = 'validation' if index % 4 == 0 else 'train'
        with replacing(root / split / str(label) / f'{index:04d}.png') as temporary:
            Image.fromarray((pixels * 255 / 16).round().astype('uint8')).save(temporary)
    (root / _DONE).touch()
