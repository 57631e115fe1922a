from pathlib import Path

from PIL import Image

from repopt_timm.train.loaders import write_digits


def test_the_digits_are_written_once_as_an_image_folder(tmp_path):
    write_digits(tmp_path)
    pictures = list(tmp_path.rglob('*.png'))
    assert len(pictures) == 1797
    assert len(list(Path(tmp_path / 'validation').rglob('*.png'))) == 450
    assert Image.open(pictures[0]).size == (8, 8)
    pictures[0].unlink()
    write_digits(tmp_path)
    assert not pictures[0].exists()
