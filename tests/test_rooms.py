import ast
from pathlib import Path

import repopt_timm

PACKAGE = Path(repopt_timm.__file__).parent
ROOMS = [
    ['reparam', 'checkpoints'],
    ['scales'],
    ['optim', 'blocks', 'cards'],
    ['models'],
    ['train', 'deploy', 'bench', 'doctor'],
    ['trial'],
    ['publish', 'publish_commands', 'cli'],
]
LEVELS = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def imported(path):
    """The rooms and modules of this package that a file imports from."""
    package = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [name.name for name in node.names]
            outer = '.'.join(package[: len(package) - node.level + 1])
            yield from (f'{outer}.{name}'.lstrip('.').split('.')[0] for name in names)


def test_every_room_has_its_place():
    assert {path.parent.name for path in PACKAGE.glob('*/__init__.py')} <= set(LEVELS)


def test_no_import_runs_upwards():
    upwards = [
        (str(path.relative_to(PACKAGE)), name)
        for path in PACKAGE.rglob('*.py')
        for name in imported(path)
        if LEVELS.get(name, 0) > LEVELS.get(path.relative_to(PACKAGE).parts[0].removesuffix('.py'), len(ROOMS))
    ]
    assert upwards == []
