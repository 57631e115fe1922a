import ast
import re
import sys
from pathlib import Path

import repopt_timm

PACKAGE = Path(repopt_timm.__file__).parent
# A file imports from its own line and the lines above it, as CONTRIBUTING.md says.
LINES = """
    architectures commands console errors files names reparam tables
    checkpoints datasets model_size reporting
    scales weights_origin
    plot cards blocks optim
    sources
    models trained_scales
    checkpoint_model
    deploy doctor merge_checkpoint publish script train
    publish_commands trial
    cli
"""
LEVELS = {room: level for level, line in enumerate(LINES.strip().splitlines()) for room in line.split()}


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def imported(path):
    """The rooms and modules of this package that a file imports from."""
    package = ['repopt_timm', *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            found = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(filter(None, [*package[: len(package) - node.level + 1], node.module or '']))
            base = base if node.level else node.module
            found = [base] if node.module else [f'{base}.{name.name}' for name in node.names]
        else:
            continue
        yield from (name.split('.')[1] for name in found if name.startswith('repopt_timm.'))


def test_no_file_imports_from_a_later_room():
    files = [path for path in PACKAGE.rglob('*.py') if path.parent != PACKAGE or not path.name.startswith('_')]
    assert {room_of(path) for path in files} == LEVELS.keys()
    wrong = [
        (str(path.relative_to(PACKAGE)), name)
        for path in files
        for name in imported(path)
        if LEVELS.get(name, 0) > LEVELS[room_of(path)]
    ]
    assert wrong == []


def test_the_method_depends_on_torch_alone():
    for path in (PACKAGE / 'reparam').glob('*.py'):
        found = re.findall(r'^(?:from|import) (\w+)', path.read_text(encoding='utf-8'), re.MULTILINE)
        assert set(found) <= {'torch', *sys.stdlib_module_names}, path
