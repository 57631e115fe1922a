"""The README's commands and code run as they stand, in the order in which a newcomer copies them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from .helpers import python_path

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text(encoding='utf-8')
RECIPES = re.findall(r'^### (.+?)\n|^```(bash|python)\n(.+?)^```', README.split('## Recipes')[1], re.M | re.S)


def blocks():
    """Yields (title of the recipe, language, code)."""
    title = ''
    for heading, language, code in RECIPES:
        title = heading or title
        if code:
            yield title, language, code


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with photos of two kinds, for all blocks."""
    folder = tmp_path_factory.mktemp('readme')
    generator = torch.Generator().manual_seed(0)
    for split, count in (('train', 16), ('validation', 8)):
        for name, brightness in (('day', 0.6), ('night', 0.2)):
            target = folder / 'photos' / split / name
            target.mkdir(parents=True)
            for index in range(count):
                image = brightness + 0.3 * torch.rand(3, 64, 64, generator=generator)
                to_pil_image(image).save(target / f'{index}.jpg')
    return folder


@pytest.mark.slow
def test_each_recipe_runs_as_it_stands(folder):
    paths = [str(Path(sys.executable).parent), os.environ['PATH']]
    environment = {**os.environ, 'PATH': os.pathsep.join(paths), 'PYTHONPATH': python_path(), 'HF_HUB_OFFLINE': '1'}
    ran = []
    for title, language, code in blocks():
        command = [sys.executable, '-c', code] if language == 'python' else ['bash', '-euo', 'pipefail', '-c', code]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f'{title}:\n{code}\n{done.stdout[-2000:]}{done.stderr[-2000:]}'
        ran.append(title)
    assert {'Train on my folder', 'Fine-tune', 'Predict', 'Export and INT8', 'My own architecture'} <= set(ran)
    assert (folder / 'mine.int8.onnx').exists()


def test_each_link_of_the_documentation_leads_somewhere():
    for page in [ROOT / 'README.md', ROOT / 'pretrained' / 'README.md', *(ROOT / 'docs').glob('*.md')]:
        text = re.sub(r'```.*?```', '', page.read_text(encoding='utf-8'), flags=re.S)
        for target in re.findall(r'\]\(([^)\s]+)\)', text):
            if '://' in target:
                continue
            path, _, anchor = target.partition('#')
            found = (page.parent / path) if path else page
            assert found.exists(), f'{page.name}: {target}'
            if anchor:
                headings = re.findall(r'^#+ (.+)$', found.read_text(encoding='utf-8'), re.M)
                slugs = [re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings]
                assert anchor in slugs, f'{page.name}: {target}'
