"`lmnb-bench`, what it refuses, and memory: what was estimated against what processes took."
import json
import shutil
import subprocess
import sys

import pytest
import torch

from lmnb.check import peak_flops
from lmnb.config import preset
from lmnb.model import memory_needed

TRAIN = '''
import json, sys
from lmnb.check import most_memory
from lmnb.config import ExperimentConfig
from lmnb.trainer import Trainer
bare = most_memory()
Trainer(ExperimentConfig(**json.loads(sys.argv[1])), sys.argv[2], quiet=True).fit()
print(json.dumps(most_memory()-bare))
'''
SHAPES = [dict(name='small'), dict(name='small', batch_size=16), dict(name='small', batch_size=16, micro_batch_size=4), dict(name='small', optimizer='adamw'),
          dict(name='medium', n_layer=4), dict(name='medium', n_layer=4, optimizer='adamw', block_size=512), dict(name='small', amp='bf16', batch_size=8),
          dict(name='small', n_kv_head=1, n_layer=12, batch_size=4)]


@pytest.mark.skipif(sys.platform != 'linux', reason='peak memory is read as Linux tells it')
@pytest.mark.parametrize('shape', SHAPES, ids=lambda s: ' '.join(map(str, s.values())))
def test_the_estimate_of_memory(tmp_path, text, shape):
    c = preset(**shape, data=str(text), max_steps=8, save_interval=2, eval_interval=100, eval_batches=1, device='cpu', **{} if 'amp' in shape else {'amp': 'off'})
    p = subprocess.run([sys.executable, '-c', TRAIN, json.dumps(vars(c)), tmp_path/'run'], capture_output=True, text=True)
    took, said = json.loads(p.stdout.splitlines()[-1]), memory_needed(c)
    assert abs(took-said) < max(.3*said, 1.2e8), f'took {took/2**20:.0f} MiB, said {said/2**20:.0f}'


@pytest.mark.skipif(shutil.which('g++') is None, reason='the compiler needs another')
def test_a_row_for_each_way(tmp_path, monkeypatch, call):
    monkeypatch.setenv('LMNB_CACHE', str(tmp_path/'cache'))
    done = call('--config', 'small', '--device', 'cpu', '--set', 'n_layer=1', 'vocab_size=300', 'block_size=32', 'n_embd=32', cwd=tmp_path, program='bench')
    rows = done.out.splitlines()
    assert done.code == 0 and len(rows) == 6, done.out + done.err
    for row, how in zip(rows[2:4], ('eager', 'compiled')):
        name, what, rate, step, share, took, said = (cell.strip() for cell in row.strip('|').split('|'))
        assert name == 'small' and how in what and int(rate.replace(',', '')) > 0 and share.endswith('%') and took.endswith('GB')
    assert 'GFLOP/s' in rows[4] and 'compile' in rows[5]
    peaks = json.loads((tmp_path/'cache/peaks.json').read_text())
    assert all(p > 0 for p in peaks.values()) and list(tmp_path.iterdir()) == [tmp_path/'cache']  # nothing else is left


@pytest.mark.parametrize('words, says', [
    (['--config', 'smal'], "unknown preset 'smal'; did you mean 'small'?"),
    (['--device', 'cuda'], 'device=cuda is not there; this machine has'),
    (['--config', 'small', '--set', 'batch_size=1000000'], 'GB are free on cpu; what fits: micro_batch_size='),
    (['--config', 'small', '--set', 'n_embd=65536', 'n_layer=512'], 'GB are free on cpu; what fits: the preset small')])
def test_refused_in_a_line(tmp_path, call, words, says):
    if torch.cuda.is_available(): pytest.skip('a device that is there is not refused')
    done = call(*words, cwd=tmp_path, program='bench')
    assert done.code == 2 and says in done.err and done.err.count('\n') == 1 and list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_fit_is_refused_at_its_start(text, tmp_path, call):
    done = call('--config', 'small', '--data', text, '--set', 'n_embd=65536', 'n_layer=512', cwd=tmp_path)
    assert done.code == 2 and 'GB of memory are needed to train this' in done.err and list(tmp_path.iterdir()) == []


def test_the_largest_peak_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv('LMNB_CACHE', str(tmp_path))
    first = peak_flops('cpu', 'off')
    key, = json.loads((tmp_path/'peaks.json').read_text())
    (tmp_path/'peaks.json').write_text(json.dumps({key: 1e30}))
    assert peak_flops('cpu', 'off') == 1e30 > first
    (tmp_path/'peaks.json').write_text('{"half of')
    assert 0 < peak_flops('cpu', 'off') < 1e30
