"Listeners: what they write shows each step once, whatever becomes of the run; whatever they do, the run goes on."
import csv
import random
import subprocess
import sys
import threading
import time

import pytest
from conftest import EVERY, TINY, events
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as Onlooker

from lmnb import CSV, TensorBoard, Trainer, load_history, preset, replay
from lmnb.config import parse_settings
from lmnb.history import Events, read_events
from lmnb.rundir import step_name


@pytest.fixture
def config(text):
    return preset('small', **parse_settings([*TINY, *EVERY, 'max_steps=20', 'save_interval=5', 'eval_interval=4', 'warmup_steps=2']), data=str(text))


def shown(folder):
    "Steps and values of each tag as TensorBoard reads them, and that its fast reader, which knows no marks, would show the same."
    board = EventAccumulator(str(folder), size_guidance=dict(scalars=0)).Reload()
    out = {tag: {x.step: x.value for x in board.Scalars(tag)} for tag in board.Tags()['scalars']}
    assert all(len(board.Scalars(tag)) == len(s) and list(s) == sorted(s) for tag, s in out.items()), out
    plain = EventAccumulator(str(folder), size_guidance=dict(scalars=0), purge_orphaned_data=False).Reload()
    assert all([x.step for x in plain.Scalars(tag)] == list(s) for tag, s in out.items())
    return out


def rows(path, kind, run_id=None):
    with open(path, newline='') as f: found = [r for r in csv.DictReader(f) if r['kind'] == kind and run_id in (None, r['run_id'])]
    return {int(r['step']): float(r['loss']) for r in found if [int(x['step']) for x in found].count(int(r['step'])) == 1}


def told(run_dir, line, upto, *listeners, val=4, run_id='r'):
    "A session as the trainer tells it, from where the last segment of `line` begins."
    e, first = Events(run_dir, run_id, line[-1]['id'], listeners=listeners), line[-1]['from_step']
    e.emit('resume' if first else 'start', step=first, max_steps=upto, lineage=line)
    for k in range(first+1, upto+1):
        e.emit('train', step=k, loss=len(line)+k/1024, lr=.5, grad_norm=float('inf'), tokens=k*8, tok_per_s=1., dt_ms=8.)
        if k % val == 0: e.emit('val', step=k, loss=len(line)+k/1024)
    assert e.close()


def segment(name, step, run_id='r'): return dict(id=name, parent=None, from_step=step, run_id=run_id)


def test_a_run_that_goes_back_is_one_curve(config, tmp_path):
    "As a user has it: the same folder and file in each session; back from 20 to 10, and to the end; then on to 30."
    def heard(): return [TensorBoard(tmp_path/'tb'), CSV(tmp_path/'t.csv')]
    Trainer(config, tmp_path/'a', listeners=heard(), quiet=True).fit()
    Trainer.resume('10', tmp_path/'a', listeners=heard(), quiet=True).fit()
    Trainer.resume('latest', tmp_path/'a', extend_steps=30, listeners=heard(), quiet=True).fit()
    h, board = load_history(tmp_path/'a'), shown(tmp_path/'tb')
    assert set(board) == {'train/loss', 'train/lr', 'train/grad_norm', 'train/tok_per_s', 'val/loss'}
    for kind, columns in dict(train=h.train, val=h.val).items():
        of_run = dict(zip(columns['step'].tolist(), columns['loss'].tolist()))
        assert board[f'{kind}/loss'] == pytest.approx(of_run) and rows(tmp_path/'t.csv', kind) == of_run and 30 in of_run


@pytest.mark.parametrize('seed', range(4))
def test_any_way_back(seed, tmp_path):
    "Sessions that end anywhere, each from a step of the lineage before; evaluations as often as each likes."
    r, line, reached = random.Random(seed), [], 0
    board, table = TensorBoard(tmp_path/'tb'), CSV(tmp_path/'t.csv')  # the same objects, several times
    (tmp_path/'tb').mkdir()
    onlooker = Onlooker(str(tmp_path/'tb'), tensor_size_guidance=dict(scalars=0))  # as `tensorboard --load_fast=false` reads
    for k in range(7):
        at = r.randint(0, reached) if k else 0
        line = [*(s for s in line if s['from_step'] < at), segment(str(k), at)]
        reached = at+r.randint(1, 12)
        told(tmp_path, line, reached, board, table, val=r.choice((2, 3, 50)))
        seen, h = shown(tmp_path/'tb'), load_history(tmp_path)
        for kind, columns in dict(train=h.train, val=h.val).items():
            of_run = dict(zip(columns['step'].tolist(), columns['loss'].tolist()))
            assert seen.get(f'{kind}/loss', {}) == rows(tmp_path/'t.csv', kind) == of_run
        there = {tag: [x.step for x in onlooker.Tensors(tag)] for tag in onlooker.Reload().Tags()['tensors']}
        assert {tag: steps for tag, steps in there.items() if steps} == {tag: list(s) for tag, s in seen.items()}
    for listener in (TensorBoard(tmp_path/'new'), CSV(tmp_path/'new.csv'), board, table): replay(tmp_path, listener)
    assert shown(tmp_path/'new') == shown(tmp_path/'tb')
    for kind in ('train', 'val'): assert rows(tmp_path/'new.csv', kind) == rows(tmp_path/'t.csv', kind)


def test_another_run_in_the_same_place(tmp_path):
    for name in 'ab':
        (tmp_path/name).mkdir()
        told(tmp_path/name, [segment(name, 0, name)], 8, TensorBoard(tmp_path/'tb'), CSV(tmp_path/'t.csv'), run_id=name)
    assert len(shown(tmp_path/'tb')['train/loss']) == len(shown(tmp_path/'tb'/'b')['train/loss']) == 8
    told(tmp_path/'a', [segment('a', 0, 'a'), segment('c', 6, 'a')], 7, TensorBoard(tmp_path/'tb'), CSV(tmp_path/'t.csv'), run_id='a')
    assert len(shown(tmp_path/'tb')['train/loss']) == 7 and len(rows(tmp_path/'t.csv', 'train', 'a')) == 7
    assert len(shown(tmp_path/'tb'/'b')['train/loss']) == len(rows(tmp_path/'t.csv', 'train', 'b')) == 8
    (tmp_path/'old').mkdir()
    (tmp_path/'old'/'events.out.tfevents.1.host.2.0').write_bytes(b'of somebody else')
    told(tmp_path/'a', [segment('d', 0, 'd')], 3, TensorBoard(tmp_path/'old'), run_id='d')
    assert len(shown(tmp_path/'old'/'d')['train/loss']) == 3


def test_what_a_kill_left_and_what_is_no_such_table(tmp_path):
    told(tmp_path, [segment('a', 0)], 9, TensorBoard(tmp_path/'tb'), CSV(tmp_path/'t.csv'))
    for f in (tmp_path/'t.csv', *(tmp_path/'tb').iterdir()): f.write_bytes(f.read_bytes()[:-5])
    other = tmp_path/'other.csv'
    other.write_text('name,price\nx,1\n')
    told(tmp_path, [segment('a', 0), segment('b', 8)], 10, TensorBoard(tmp_path/'tb'), CSV(tmp_path/'t.csv'), CSV(other))
    assert list(rows(tmp_path/'t.csv', 'train')) == list(shown(tmp_path/'tb')['train/loss']) == list(range(1, 11))
    assert other.read_text() == 'name,price\nx,1\n' and 'another table' in events(tmp_path, 'warn')[0]['text']
    assert not list(tmp_path.rglob('*.tmp'))


def test_a_table_of_two_runs_at_once(tmp_path):
    one, two = CSV(tmp_path/'t.csv'), CSV(tmp_path/'t.csv')
    line = [dict(id='a', run_id='a', parent=None, from_step=0)]
    for run in 'ab': one(dict(kind='start', run_id=run, segment=run, step=0, lineage=line))
    def tell():
        for k in range(1, 301): one(dict(kind='train', run_id='a', segment='a', step=k, loss=1.))
    thread = threading.Thread(target=tell)
    thread.start()
    while thread.is_alive(): two(dict(kind='resume', run_id='b', segment='b', step=0, lineage=line))
    assert list(rows(tmp_path/'t.csv', 'train')) == list(range(1, 301))


def test_a_table_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    told(tmp_path, [segment('a', 0)], 9, CSV(tmp_path/'t.csv'), TensorBoard(tmp_path/'tb'))
    before = {p: p.read_bytes() for p in (tmp_path/'t.csv', *(tmp_path/'tb').iterdir())}
    def full(*a): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('os.replace', full)
    told(tmp_path, [segment('a', 0), segment('b', 4)], 6, CSV(tmp_path/'t.csv'), TensorBoard(tmp_path/'tb'))
    assert all(p.read_bytes() == b for p, b in before.items()) and len(events(tmp_path, 'warn')) == 2


def test_without_tensorboard_a_line_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorboard.summary.writer.record_writer', None)
    with pytest.raises(ImportError) as e: TensorBoard('tb')
    assert "pip install 'lmnb[tensorboard]'" in str(e.value) and '\n' not in str(e.value)


def test_a_listener_may_fail_leave_hang_or_meddle(tmp_path):
    hold, heard = threading.Event(), []
    def leaves(e): sys.exit(3)
    def meddles(e): e.clear()
    def hangs(e): hold.wait(60)
    e = Events(tmp_path, 'r', 'a', listeners=[meddles, leaves, hangs, None, heard.append])
    e.MOST = 50
    lineage = [segment('a', 0)]
    e.emit('start', step=0, max_steps=100, lineage=lineage)
    for k in range(100): e.emit('train', step=k, loss=1.); time.sleep(.001)
    e.emit('end', step=100)
    began = time.monotonic()
    assert e.close(wait_s=.5) and time.monotonic()-began < 2 and lineage == [segment('a', 0)]
    assert [x['step'] for x in heard if x['kind'] == 'train'] == list(range(100)) and heard[-1]['kind'] == 'end'
    lost = {x['text'].split()[1]: x['text'] for x in read_events(tmp_path/'metrics.jsonl')[0] if x['kind'] == 'warn'}
    assert set(lost) == {'leaves', 'hangs', 'NoneType'} and 'SystemExit' in lost['leaves'] and '50 events wait' in lost['hangs']
    hold.set()


SLOW = """
import sys, time, tempfile, torch
from lmnb.history import Events, read_events
a = torch.randn(300, 300)
def sleeps(e): time.sleep(60)
def computes(e):
    while True: a@a
def prints(e):
    while True: print('.'*1000)
d = tempfile.mkdtemp()
events = Events(d, 'r', 'a', listeners=[sleeps, computes, prints])
events.emit('end', step=1)
assert events.close(1)
print(*(e['text'] for e in read_events(d+'/metrics.jsonl')[0] if e['kind']=='warn'), sep='\\n', file=sys.stderr)
"""


def test_the_slow_are_left_behind_and_python_ends_well():
    "A thread that is in torch as the interpreter ends would abort it: exit code 134."
    p = subprocess.run([sys.executable, '-c', SLOW], capture_output=True, text=True, timeout=50)  # one sleeps for a minute
    assert p.returncode == 0, p.stderr
    assert [l.split()[1] for l in p.stderr.splitlines()] == ['sleeps', 'computes', 'prints'] and 'not done 1 s after' in p.stderr


def test_replay_of_a_branch_and_of_nothing(config, tmp_path):
    Trainer(config, tmp_path/'a', quiet=True).fit()
    Trainer.resume(tmp_path/'a'/step_name(10), tmp_path/'b', extend_steps=15, quiet=True).fit()
    heard = []
    replay(tmp_path/'b', heard.append)
    assert [e['step'] for e in heard if e['kind'] == 'train'] == list(range(1, 16)) and heard[0]['kind'] == 'resume'
    assert len({e['segment'] for e in heard}) == 2 and len({e['run_id'] for e in heard}) == 1
    (tmp_path/'metrics.jsonl').write_text('')
    for d in (tmp_path, tmp_path/'none'):
        with pytest.raises(FileNotFoundError): replay(d, print)
