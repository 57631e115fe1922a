import argparse
import importlib
import runpy
import sys
import time
from pathlib import Path

import pytest

from .helpers import TINY

FOLDER = Path(__file__).parents[1] / 'benchmarks'


@pytest.mark.parametrize(
    ('script', 'contenders'),
    [
        ('optimizer', ['SGD(fused=True)', 'RepOptSGD()', 'AdamW(fused=True)', 'RepOptAdamW()']),
        ('training', [TINY, f'{TINY}_branches']),
        ('search', [TINY, f'{TINY}_hs']),
    ],
)
def test_a_benchmark_compares_its_contenders(script, contenders, monkeypatch, capsys):
    words = ['--model', TINY, '--img-size', '32', '--batch-size', '3', '--rounds', '2', '--device', 'cpu']
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, 'argv', [script, *words, '--threads', '1'])
    runpy.run_path(str(FOLDER / f'{script}.py'), run_name='__main__')
    lines = capsys.readouterr().out.splitlines()
    rows = {cells[1].strip(): cells[2:] for line in lines if len(cells := line.split('|')) > 3}
    assert set(contenders) <= set(rows)
    first, last = rows[contenders[0]], rows[contenders[-1]]
    assert not first[1].strip() and float(last[1].split()[0]) > 0
    # On a busy machine two rounds say no more of the times.
    assert all(time.strip().endswith('ms') for time, *_ in (first, last))


def test_the_ratio_of_a_slower_contender_is_above_one(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    turns = importlib.import_module('turns')
    args = argparse.Namespace(rounds=3, threads=1)
    table = turns.time_table('step', {'fast': int, 'slow': lambda: time.sleep(0.01)}, args)
    *_, ratio, _ = table.splitlines()[-1].split('|')
    assert float(ratio.split()[0]) > 1
