import re
from pathlib import Path

import repopt_timm
from repopt_timm.sources import shipped_repositories

PYPROJECT = Path(__file__).parents[1] / 'pyproject.toml'


def test_all_shipped_repositories_go_into_the_wheel():
    text = PYPROJECT.read_text()
    assert shipped_repositories()
    for name in shipped_repositories():
        assert f'"pretrained/{name}" = "repopt_timm/pretrained/{name}"' in text


def test_the_version_is_stated_once():
    assert re.search(r'dynamic = \["version"\].*path = "repopt_timm/__init__\.py"', PYPROJECT.read_text(), re.DOTALL)
    assert repopt_timm.__version__ in (PYPROJECT.parent / 'CHANGELOG.md').read_text()
