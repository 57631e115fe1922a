import subprocess
import sys
from pathlib import Path

import pytest

from .helpers import TINY
from .train.runs import ENVIRONMENT

FOLDER = Path(__file__).parents[1] / 'benchmarks'


@pytest.mark.parametrize(
    ('script', 'contenders'),
    [
        ('optimizer', ['SGD(fused=True)', 'RepOptSGD()', 'AdamW(fused=True)', 'RepOptAdamW()']),
        ('training', [TINY, f'{TINY}_branches']),
        ('search', [TINY, f'{TINY}_hs']),
    ],
)
def test_a_benchmark_compares_its_contenders(script, contenders):
    words = ['--model', TINY, '--img-size', '32', '--batch-size', '3', '--rounds', '2', '--device', 'cpu']
    command = [sys.executable, str(FOLDER / f'{script}.py'), *words]
    found = subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, text=True, timeout=300).stdout
    rows = {cells[1].strip(): cells[2:] for line in found.splitlines() if len(cells := line.split('|')) > 3}
    assert set(contenders) <= set(rows)
    first, last = rows[contenders[0]], rows[contenders[-1]]
    assert first[0].strip().endswith('ms') and not first[1].strip() and ' to ' in last[1]
