"One process or several, with whole or shared models: the same windows, the same losses, one file for all, and the same bits for the same processes."
import json
import os
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TORCHRUN, events

from lmnb import load_checkpoint
from lmnb.check import differences

TINY = dict(vocab_size=300, block_size=32, n_layer=2, n_head=2, n_kv_head=1, n_embd=16, batch_size=4, warmup_steps=5, max_steps=20,
            save_interval=10, eval_interval=5, eval_batches=3, log_interval=1)
MODES = 'one', 'ddp2', 'fsdp2', 'ddp4', 'fsdp4'
OWN = 'lineage', 'software'  # of each training


def size(mode): return int(mode[-1]) if mode != 'one' else 1


def together(n, jobs, folder):
    "Do `jobs` in `n` processes."
    (folder/f'jobs{n}.json').write_text(json.dumps(jobs))
    p = subprocess.run([*TORCHRUN, '--standalone', f'--nproc-per-node={n}', str(ROOT/'tests'/'many.py'), str(folder/f'jobs{n}.json')], cwd=folder,
                       env=dict(os.environ, LMNB_TIMEOUT_S='60'), capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr[-3000:]


def job(mode, **more): return dict(parallel=None if mode == 'one' else mode[:-1], **more)


TRAININGS = dict(muon={}, adamw=dict(optimizer='adamw'), rough=dict(dropout=.1, micro_batch_size=1, amp='fp16', batch_size=8))


@pytest.fixture(scope='module')
def runs(text, tmp_path_factory):
    "Each training in each mode from the beginning, and then from the middle of each other mode's (`rough`: of its own)."
    folder = tmp_path_factory.mktemp('many')
    def path(name, mode, source=None): return str(folder/f'{name}-{mode}-from-{source}')
    for stage in ('begin', 'resume'):
        for n in (1, 2, 4):
            jobs = []
            for name, mode in product(TRAININGS, (m for m in MODES if size(m) == n)):
                if stage == 'begin': jobs.append(job(mode, dir=path(name, mode), config=TINY | dict(data=str(text)) | TRAININGS[name]))
                else: jobs += [job(mode, dir=path(name, mode, s), resume=f'{path(name, s)}/checkpoint_step_10.pt')
                               for s in (MODES if name != 'rough' else [mode])]
            together(n, jobs, folder)
    return lambda *which: Path(path(*which))


def final(run): return load_checkpoint(run/'final_model.pt')


def far(a, b):
    "The largest difference of two runs' losses."
    x, y = ([(e['step'], e['loss']) for k in ('train', 'val') for e in events(r, k)] for r in (a, b))
    assert [s for s, _ in x] == [s for s, _ in y] and len(x) >= 24
    return max(abs(p-q) for (_, p), (_, q) in zip(x, y))


@pytest.mark.parametrize('mode', MODES[1:])
@pytest.mark.parametrize('name', ['muon', 'adamw'])
def test_same_losses(runs, name, mode):
    one, many = runs(name, 'one'), runs(name, mode)
    assert far(one, many) < 1e-4
    a, b = final(one), final(many)
    for k, t in a['model_state_dict'].items(): torch.testing.assert_close(b['model_state_dict'][k], t, rtol=1e-3, atol=1e-4)
    assert b['optimizer_state_dict']['state'].keys() == a['optimizer_state_dict']['state'].keys()


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', TRAININGS)
def test_same_bits_when_resumed(runs, name, mode):
    again = differences(final(runs(name, mode)), final(runs(name, mode, mode)), OWN)
    assert again == []


@pytest.mark.parametrize('source, mode', [p for p in product(MODES, MODES) if p[0] != p[1]])
@pytest.mark.parametrize('name', ['muon', 'adamw'])
def test_any_file_anywhere(runs, name, source, mode):
    straight, here = runs(name, source), runs(name, mode, source)
    assert far(straight, here) < 1e-4
    a, b = ({e['step']: e['loss'] for e in events(r, 'train')} for r in (straight, here))
    assert abs(a[11]-b[11]) < 2e-6  # nothing was lost: the first step has the same loss
    assert 'processes' in str(events(here, 'resume')[0]['differs'])


ONCE = """
import math
import sys
import torch.distributed as dist
from torch.profiler import profile
from lmnb import Trainer, preset
from lmnb.optim import local
from lmnb.parallel import disband

sent = []
def hook(state, bucket):
    sent.append('ddp')
    return dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda f: f.value()[0])

config = dict(vocab_size=300, n_layer=2, n_embd=32, n_head=2, block_size=32, batch_size=8, data=sys.argv[1], max_steps=4, eval_interval=4, eval_batches=1)
for kind in ('ddp', 'fsdp'):
    def training(**more): return Trainer(preset('small', **config, **more), f'{kind}-{len(more)}', quiet=True, parallel=kind)
    whole, split, compiled = training(), training(micro_batch_size=1), training(compile=True)
    for t in (whole, split):
        if kind == 'ddp': t.engine.forward.register_comm_hook(None, hook)
    losses = []
    for t in (whole, split, compiled):
        sent.clear()
        with profile() as p: losses.append([t.engine.train_step(k, 3e-3)['loss'] for k in range(1, 5)])
        sent += [e.name for e in p.events() if e.name == 'c10d::_reduce_scatter_base_']
        if t is not compiled: assert len(sent) == 4*(1 if kind == 'ddp' else 3), (kind, sent)  # a bucket, or blocks and root
    for other in losses[1:]: assert max(abs(a-b) for a, b in zip(losses[0], other)) < 1e-4, (kind, losses)
    compiled.fit()

t = training(amp='fp16', dropout=0.)  # fsdp: a number that is not finite in one process' share is skipped by all, and all halve the scale
e, inner = t.engine, t.engine._gradients
e.train_step(1, 3e-3)
before, scale = local(e.model.embed.weight).clone(), e.scaler.get_scale()
def spoilt(*batch):
    loss = inner(*batch)
    if dist.get_rank() == 1: local(e.model.embed.weight.grad)[0, 0] = float('inf')
    return loss
e._gradients = spoilt
assert not math.isfinite(e.train_step(2, 3e-3)['grad_norm'])
assert t.world.exchange(e.scaler.get_scale()) == [scale/2]*2 and local(e.model.embed.weight).equal(before)
e._gradients = inner
assert math.isfinite(e.train_step(3, 3e-3)['grad_norm'])
disband()
"""


def test_within_a_step(text, tmp_path):
    (tmp_path/'once.py').write_text(ONCE)
    p = subprocess.run([*TORCHRUN, '--standalone', '--nproc-per-node=2', 'once.py', str(text)], cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert p.returncode == 0, p.stderr[-3000:]
    for kind in ('ddp', 'fsdp'): assert load_checkpoint(tmp_path/f'{kind}-1'/'final_model.pt')['global_step'] == 4
