from pathlib import Path

from repopt_timm.resources import shipped_repositories

PYPROJECT = Path(__file__).parents[1] / 'pyproject.toml'


def test_all_shipped_repositories_go_into_the_wheel():
    text = PYPROJECT.read_text()
    assert shipped_repositories()
    for name in shipped_repositories():
        assert f'"pretrained/{name}" = "repopt_timm/pretrained/{name}"' in text
