"""The README's commands and code run, in the order in which a newcomer copies them, and for fewer epochs and seeds."""

import re
import shlex
from pathlib import Path

import pytest

from repopt_timm.cli import main

from .helpers import python_path

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text(encoding='utf-8')
RECIPES = re.findall(r'^### (.+?)\n|^```(bash|python)\n(.+?)^```', README.split('## Recipes')[1], re.M | re.S)


@pytest.mark.slow
def test_each_recipe_runs(images, tmp_path, monkeypatch):
    (tmp_path / 'photos').symlink_to(images)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PYTHONPATH', python_path())
    title, ran = '', set()
    for heading, language, code in RECIPES:
        title = heading or title
        for line in code.replace('\\\n', '').splitlines() if language == 'bash' else ():
            # In this process, as an interpreter starts for longer than most of these commands take.
            words = shlex.split(
                re.sub(r'--epochs \d+', '--epochs 1', line.replace('--seeds 3', '--seeds 2')), comments=True
            )
            assert words[0] == 'repopt-timm' and main(words[1:]) == 0, f'{title}: {line}'
        ran |= {title} if code else set()
    assert {'Train on my folder', 'Fine-tune', 'Predict', 'Export and INT8'} <= ran
    assert (tmp_path / 'mine.int8.onnx').exists()


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
