"What the tests share: a small text, commands run from outside, and what tells whether anything changed on disk."
import ctypes
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from faults.counting import pytest_runtest_makereport, pytest_terminal_summary, row, times  # noqa: F401

os.environ.update(OMP_WAIT_POLICY='PASSIVE', OMP_NUM_THREADS='1')  # before torch: threads that spin take others' cores

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run']
TINY = ('vocab_size=300 block_size=32 n_layer=1 n_head=2 n_embd=16 batch_size=2 micro_batch_size=0 eval_batches=2 '
        'warmup_steps=5').split()
EVERY = ('save_interval=50', 'eval_interval=25', 'log_interval=1')
SHORT = (*TINY, *EVERY, 'dropout=0.1', 'max_steps=300')  # its cooldown begins after step 240


def command(program):
    "How to start a command as a process of its own."
    if program == 'run_experiment.py': return [sys.executable, str(ROOT/program)]
    return [sys.executable, '-m', 'lmnb.cli', program.removeprefix('lmnb-')]


def train(*args, cwd, program='lmnb-train', limit=None, **env):
    "Run a command from outside; `limit` is called in the new process before it begins."
    p = subprocess.run([*command(program), *map(str, args)], cwd=cwd, env=dict(os.environ, **env), text=True,
                       encoding='utf-8', capture_output=True, timeout=180, preexec_fn=limit)
    return SimpleNamespace(code=p.returncode, out=p.stdout, err=p.stderr)


def guided(*args, **kw): return train(*args, program='run_experiment.py', **kw)


@pytest.fixture
def call(monkeypatch, capsys):
    "Run a command inside this process, which saves importing torch."
    def run(*args, cwd, program='train', **env):
        from lmnb import cli
        monkeypatch.chdir(cwd)
        for k, v in env.items(): monkeypatch.setenv(k, str(v))
        capsys.readouterr()
        with pytest.raises(SystemExit) as e: getattr(cli, program)([str(a) for a in args])
        return SimpleNamespace(code=e.value.code, **capsys.readouterr()._asdict())
    return run


def powerless():
    "Take from root what passes over permissions (PR_CAPBSET_DROP of CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH)."
    if os.geteuid() == 0: assert [ctypes.CDLL(None).prctl(24, cap, 0, 0, 0) for cap in (1, 2)] == [0, 0]


def tree(folder):
    "All folders, and all files with hash and time, but for `.lock`: equal trees mean that nothing was touched."
    def known(p): return (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) if p.is_file() else None
    return {str(p.relative_to(folder)): known(p) for p in Path(folder).rglob('*') if p.name != '.lock'}


def events(run, kind):
    lines = (run/'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    return [e for e in map(json.loads, lines) if e['kind'] == kind]


def write_text(path, seed=0, lines=1500):
    "A text of made-up words; another seed gives another text."
    r = random.Random(seed)
    words = [''.join(r.choices('abcdefghijklmnopqrstuvwxyz', k=r.randint(2, 7))) for _ in range(200)]
    path.write_text('\n'.join(f'def {" ".join(r.choices(words, k=8))}:' for _ in range(lines)), encoding='utf-8')
    return path


@pytest.fixture(scope='session', autouse=True)
def cache(tmp_path_factory):
    "Token files of all tests, apart from the user's."
    os.environ['LMNB_CACHE'] = str(tmp_path_factory.mktemp('cache'))


@pytest.fixture(scope='session')
def text(tmp_path_factory): return write_text(tmp_path_factory.mktemp('text')/'corpus.txt')


def _run(text, cwd, start, *args):
    "A finished run of `corpus.txt`, named as seen from `cwd`."
    shutil.copy(text, cwd)
    done = start('--data', 'corpus.txt', *args, cwd=cwd)
    assert done.code == 0, done.err
    return SimpleNamespace(cwd=cwd, run=cwd/'checkpoints', **vars(done))


@pytest.fixture(scope='session')
def guide(text, tmp_path_factory):
    "The guide's first command: 2,000 steps."
    return _run(text, tmp_path_factory.mktemp('guide'), guided, '--config', 'rtx4090', '--set', *TINY)


@pytest.fixture(scope='session')
def short(text, tmp_path_factory):
    "300 steps, every one of them recorded."
    return _run(text, tmp_path_factory.mktemp('short'), train, '--config', 'medium', '--set', *SHORT)


@pytest.fixture
def copy(short, tmp_path):
    "A copy of the short run to work on; its text stays behind, only the tokens in the cache are left."
    return Path(shutil.copytree(short.run, tmp_path/'checkpoints'))
