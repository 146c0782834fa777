"Numbers that are not finite, memory that does not suffice, an evaluation that fails, a slow writer: what is saved is a sound state of its own step."
import math
import threading

import pytest
import torch
from conftest import EVERY, TINY, events

import lmnb.checkpoint
from lmnb import Trainer, load_checkpoint, preset
from lmnb.check import differences
from lmnb.config import config_from, parse_settings
from lmnb.trainer import TrainingFailed

FINITE = 'update skipped and told, nothing else changes; ten in a row end the run; no checkpoint holds such a number'
MEMORY = 'half the micro-batch, the same batch and order, told, exact from there on; with one sequence the run ends with what would help'
PAST = ('lineage', 'software')


@pytest.fixture
def config(text):
    return preset('small', **parse_settings([*TINY, *EVERY, 'max_steps=20', 'save_interval=10', 'eval_interval=10']), data=str(text))


def changed(config, **kw): return config_from(vars(config) | kw)[0]
def names(folder): return sorted(p.name for p in folder.glob('*.pt'))


def wrapped(engine, name, around):
    "Let `around` call the engine's own method, given as its first argument."
    own = getattr(engine, name)
    setattr(engine, name, lambda *a: around(own, *a))


@pytest.mark.parametrize('amp', ['off', 'fp16'])
@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
@pytest.mark.parametrize('late', [1, 3, 5])
def test_a_slow_writer_writes_its_own_step(row, config, tmp_path, monkeypatch, optimizer, amp, late):
    "It is held back until training is `late` steps on; the file is still that of the step it was asked for, to the bit."
    row('a writer that is held back', 'the file holds the numbers of its own step, not later ones; a second save waits for it')
    row.tried()
    config = changed(config, optimizer=optimizer, amp=amp)
    Trainer(config, tmp_path/'straight', quiet=True).fit()
    go, begun, started = threading.Event(), [], threading.Event()
    write = lmnb.checkpoint.write_checkpoint
    def held(state, folder, names):
        begun.append(state['global_step'])
        started.set()
        if state['global_step'] == 10: assert go.wait(60)
        return write(state, folder, names)
    monkeypatch.setattr(lmnb.checkpoint, 'write_checkpoint', held)
    t = Trainer(config, tmp_path/'late', quiet=True)
    def step(own, k, lr):
        record = own(k, lr)
        if k == 10+late: assert started.wait(60) and begun == [10] and not go.is_set(); go.set()
        return record
    wrapped(t.engine, 'train_step', step)
    t.fit()
    for name in ('checkpoint_step_10.pt', 'final_model.pt'):
        assert differences(load_checkpoint(tmp_path/'late'/name), load_checkpoint(tmp_path/'straight'/name), PAST) == []


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('what', ['loss', 'gradient'])
@pytest.mark.parametrize('at', [1, 7, 10, 20])
def test_a_number_that_is_not_finite(row, config, tmp_path, at, what, value):
    "At step `at`, where the 10th and the last are saved: weights and moments stay as they are, and training goes on."
    row('loss or gradient not finite', FINITE)
    row.tried()
    t = Trainer(config, tmp_path/'a', quiet=True)
    def spoil():
        if what == 'gradient': next(t.model.parameters()).grad.view(-1)[3] = value
    def whole(): return [x.clone() for x in [*t.model.parameters(), *(v for o in t.engine.opts for s in o.state.values() for v in s.values() if isinstance(v, torch.Tensor))]]
    def step(own, k, lr):
        before = whole()
        record = own(k, lr)
        if k == at: assert all(map(torch.equal, before, whole())) and (k == 1 or len(before) == len(whole()))
        return record
    def update(own):
        if t.step+1 == at: spoil()
        return own()
    wrapped(t.engine, 'train_step', step)
    wrapped(t.engine, '_update', update)
    if what == 'loss': t.engine.forward = lambda x, y: t.model(x, y)*(value if t.step+1 == at else 1.)
    t.fit()
    assert t.step == 20 and [(e['code'], e['step']) for e in events(tmp_path/'a', 'warn')] == [('skip', at)]
    for p in (tmp_path/'a').glob('*.pt'):
        state = load_checkpoint(p)
        moments = [v for s in state['optimizer_state_dict']['state'].values() for v in s.values()]
        assert all(torch.as_tensor(v).isfinite().all() for v in [*state['model_state_dict'].values(), *moments])


def test_an_evaluation_that_fails_costs_no_save(row, config, tmp_path, monkeypatch):
    row('an evaluation that raises at a save', 'the checkpoint of that step is there')
    row.tried()
    t = Trainer(config, tmp_path/'a', quiet=True)
    monkeypatch.setattr(t, 'evaluate', lambda: 1/0, raising=False)
    t.fit()
    assert {'checkpoint_step_10.pt', 'final_model.pt'} <= set(names(tmp_path/'a')) and events(tmp_path/'a', 'warn')[0]['code'] == 'eval'


def test_ten_bad_steps_end_the_run_and_no_weight_is_bad(row, config, tmp_path):
    row('loss or gradient not finite', FINITE)
    row.tried(2)
    t = Trainer(changed(config, max_steps=200, save_interval=2), tmp_path/'a', quiet=True)
    t.fit(max_minutes=0)
    t.engine.forward = lambda x, y: t.model(x, y)*math.nan
    with pytest.raises(TrainingFailed, match='ten steps in a row'): t.fit()
    for p in (tmp_path/'a').glob('*.pt'): assert all(v.isfinite().all() for v in load_checkpoint(p)['model_state_dict'].values())
    t = Trainer(changed(config, lr=3e38, optimizer='adamw', save_interval=2), tmp_path/'b', quiet=True)
    with pytest.raises(TrainingFailed): t.fit()
    assert names(tmp_path/'b') == []


@pytest.mark.parametrize('first', [1, 7])
@pytest.mark.parametrize('error', [MemoryError(), torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_too_little_memory_halves_the_micro_batch(row, config, tmp_path, error, first):
    "From step `first` on only one sequence fits: the step is begun again, and what follows is exact."
    row('out of memory', MEMORY)
    row.tried()
    def short_of_memory(t):
        whole = t.engine.forward
        def forward(x, y):
            if t.step+1 >= first and len(x) > 1: raise error
            return whole(x, y)
        t.engine.forward = forward
        return t
    config = changed(config, batch_size=4, save_interval=10)
    short_of_memory(Trainer(config, tmp_path/'a', quiet=True)).fit()
    [warned] = [e for e in events(tmp_path/'a', 'warn') if e['code'] == 'memory'] if first == 1 else events(tmp_path/'a', 'warn')[-1:]
    assert warned['step'] == first and 'micro_batch_size is 1' in events(tmp_path/'a', 'warn')[-1]['text']
    ten, end = (load_checkpoint(tmp_path/'a'/f'checkpoint_step_{k}.pt') for k in (10, 20))
    assert ten['config'].micro_batch_size == ten['software']['micro_batch'] == 1 and ten['config'].batch_size == 4
    resumed = Trainer.resume(tmp_path/'a'/'checkpoint_step_10.pt', tmp_path/'b', quiet=True).fit()
    assert differences(load_checkpoint(tmp_path/'b'/'final_model.pt'), end, ('lineage', 'software')) == []
    whole = Trainer(config, tmp_path/'c', quiet=True).fit()
    assert [r['loss'] for r in resumed.train_history] == pytest.approx([r['loss'] for r in whole.train_history], rel=1e-4)


def test_with_one_sequence_too_little_memory_ends_the_run(row, config, tmp_path):
    row('out of memory', MEMORY)
    row.tried()
    t = Trainer(config, tmp_path/'a', quiet=True)
    t.fit(max_minutes=0)
    def forward(x, y): raise MemoryError
    t.engine.forward = forward
    with pytest.raises(TrainingFailed, match='not enough memory: lower micro_batch_size, block_size or the model'): t.fit()
    assert names(tmp_path/'a') == ['checkpoint_auto.pt'] and load_checkpoint(tmp_path/'a'/'checkpoint_auto.pt')['global_step'] == 1
