"""Writes CIFAR-10 as the folder of JPEG files that the project's numbers are on.

    python docs/evidence/cifar10.py cifar10

torchvision downloads the images. They become `train/<class>/0000.jpg` and `validation/<class>/0000.jpg`, in quality 75
with halved chroma, which are Pillow's defaults.
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path

from torchvision.datasets import CIFAR10


def main() -> None:
    output = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as downloads:
        for split, train in (('train', True), ('validation', False)):
            images = CIFAR10(downloads, train=train, download=True)
            written: Counter[str] = Counter()
            for image, label in images:
                name = images.classes[label]
                folder = output / split / name
                folder.mkdir(parents=True, exist_ok=True)
                image.save(folder / f'{written[name]:04}.jpg')
                written[name] += 1


if __name__ == '__main__':
    main()
