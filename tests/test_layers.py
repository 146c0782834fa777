"A module imports from lower numbers only, and what must start fast imports nothing slow."
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
ORDER = {m[2]: int(m[1]) for p in (root/'nbs').glob('*.ipynb') if (m := re.fullmatch(r'(\d\d)_(\w+)\.ipynb', p.name))}


def imports(path, top_only=False):
    "Modules that a file imports, anywhere or at its top level."
    tree = ast.parse(path.read_text(encoding='utf-8'))
    nodes = tree.body if top_only else ast.walk(tree)
    for n in nodes:
        if isinstance(n, ast.Import): yield from (a.name for a in n.names)
        if isinstance(n, ast.ImportFrom): yield f'lmnb.{n.module or ""}' if n.level else n.module


@pytest.mark.parametrize('module', sorted(ORDER, key=ORDER.get))
def test_imports_point_down(module):
    used = {i.split('.')[1] for i in imports(root/'lmnb'/f'{module}.py') if i.startswith('lmnb.')} - {''}  # the version
    assert used or module != 'trainer'
    assert all(ORDER[u] < ORDER[module] for u in used), used


@pytest.mark.parametrize('module', ['config', 'data', 'schedule', 'history', 'listeners', 'checkpoint', 'rundir', 'background', 'cli',
                                    '__init__'])
def test_no_torch_at_the_top(module):
    slow = {'torch', 'matplotlib', 'fastprogress', 'IPython', 'tokenizers', 'pandas', 'tensorboard'}
    assert not {i.split('.')[0] for i in imports(root/'lmnb'/f'{module}.py', top_only=True)} & slow


def loaded(code):
    "Top-level modules after running `code` in a fresh process."
    out = subprocess.run([sys.executable, '-c', f'{code}\nimport sys; print(*{{m.split(".")[0] for m in sys.modules}})'],
                         capture_output=True, text=True, check=True)
    return set(out.stdout.splitlines()[-1].split())


def test_listing_runs_needs_no_torch(tmp_path):
    shown = '; '.join(f'print(lmnb.runs.runs_{how}({str(tmp_path)!r}))' for how in ('table', 'tree', 'json'))
    assert not loaded(f'import lmnb, lmnb.cli, lmnb.runs; {shown}') & {'torch', 'matplotlib'}


TRAIN = """
import os, pathlib
os.environ['LMNB_CACHE'] = 'cache'
pathlib.Path('t.txt').write_text('a few words '*900)
from lmnb import Trainer, preset
Trainer(preset('small', data='t.txt', vocab_size=300, block_size=16, n_layer=1, n_embd=16, max_steps=2), quiet=True).fit()
import sys; assert 'torch._dynamo' not in sys.modules, 'the compiler takes as long to import as torch itself'
"""


def test_training_imports_neither_matplotlib_nor_the_compiler(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert 'torch' in (got := loaded(TRAIN)) and 'matplotlib' not in got


def test_the_panel_needs_no_torch(): assert 'torch' not in loaded('import lmnb; lmnb.ResumePanel')


def test_public_names():
    import lmnb
    for name in lmnb.__all__: assert getattr(lmnb, name).__doc__, name
    assert not set(lmnb.__all__) & set(ORDER), 'a lazy name equals a module'
