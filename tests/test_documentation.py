"""The pages keep what they say: commands and code run or are at least understood, links lead somewhere."""

import importlib
import re
import runpy
import shlex
from pathlib import Path

import pytest
import timm

from repopt_timm.cli import main
from repopt_timm.commands import COMMANDS
from repopt_timm.console import CommandParser
from repopt_timm.train.parsing import parse_arguments
from repopt_timm.trial.trial_settings import read_arguments

from .helpers import python_path

ROOT = Path(__file__).parents[1]
PAGES = {page.stem: page.read_text(encoding='utf-8') for page in (ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md')))}


def blocks(language, text):
    return re.findall(rf'^```{language}\n(.+?)^```', text, re.M | re.S)


def commands(text):
    programs = ('repopt-timm ', 'python train.py ', 'python docs/evidence/starts.py ')
    lines = [line for block in blocks('bash', text) for line in block.replace('\\\n', '').splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(programs)]


def test_the_commands_of_the_pages_are_understood():
    found = [words for text in PAGES.values() for words in commands(text)]
    assert len(found) > 50
    for program, name, *words in found:
        if name in ('train', 'train.py'):
            parse_arguments(words)
        elif name == 'trial' or program == 'python':
            parse_arguments(read_arguments(words)[1])
        elif name != 'run':
            parser = CommandParser()
            importlib.import_module(COMMANDS[name].module, 'repopt_timm').add_commands(parser.add_subparsers())
            parser.parse_args([name, *words])


@pytest.mark.slow
def test_each_recipe_of_the_readme_runs_for_fewer_epochs_and_seeds(images, tmp_path, monkeypatch):
    (tmp_path / 'photos').symlink_to(images)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PYTHONPATH', python_path())
    recipes = re.sub(r'--epochs \d+', '--epochs 1', PAGES['README'].split('## Recipes')[1]).replace(
        '--seeds 3', '--seeds 2'
    )
    for words in commands(recipes):
        # In this process, as an interpreter starts for longer than most of these commands take.
        assert words[0] == 'repopt-timm' and main(words[1:]) == 0, shlex.join(words)
    assert (tmp_path / 'mine.int8.onnx').exists()


# The page of deployment has a test of its own: its blocks need a trained model, a photograph and torchao.
@pytest.mark.slow
@pytest.mark.parametrize('page', [page for page in PAGES if page != 'deployment' and blocks('python', PAGES[page])])
def test_each_block_of_code_runs_alone(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks('python', PAGES[page]):
        exec(compile(block, page, 'exec'), {'__name__': '__main__'})


@pytest.mark.slow
def test_the_readmes_first_command_trains_and_reports(tmp_path, monkeypatch):
    pytest.importorskip('sklearn')
    monkeypatch.chdir(tmp_path)
    assert main(['quickstart', '--epochs', '1', '--train-images', '128']) == 0
    assert (tmp_path / 'output/quickstart/report.md').exists()


@pytest.mark.slow
@pytest.mark.skipif(not timm.is_model('lcnetv2_base'), reason='this timm lacks a network of the table')
def test_the_readmes_table_of_networks_is_what_its_script_prints(capsys):
    runpy.run_path(str(ROOT / 'docs/figures/networks.py'), run_name='__main__')
    printed = capsys.readouterr().out
    assert 'repopt_vgg_a0' in printed and printed in PAGES['README']


@pytest.mark.parametrize('page', [*ROOT.glob('docs/*.md'), ROOT / 'README.md', ROOT / 'pretrained/README.md'], ids=str)
def test_each_link_of_a_page_leads_somewhere(page):
    text = re.sub(r'```.*?```', '', page.read_text(encoding='utf-8'), flags=re.S)
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        if '://' in target:
            continue
        path, _, anchor = target.partition('#')
        found = (page.parent / path) if path else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r'^#+ (.+)$', found.read_text(encoding='utf-8'), re.M)
            slugs = [re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings]
            assert anchor in slugs, target
