"Files from a stranger: no code runs, no memory is eaten, nothing hangs, and a line says why the file is refused."
import io
import json
import os
import pickle
import re
import resource
import struct
import tarfile
import zipfile
import zlib

import pytest
import torch
from conftest import write_text
from exact import TINY, forked

import lmnb.panel
from lmnb import ExperimentConfig, Trainer, load_checkpoint, load_history, preset
from lmnb.check import differences
from lmnb.background import condition, stop
from lmnb.checkpoint import MEMBER, describe
from lmnb.data import load_corpus
from lmnb.history import Tail, say
from lmnb.rundir import RunDir
from lmnb.runs import runs_table, runs_tree

HELD = 'no code runs, at most 300 MB are used, it ends, and one line says why (or the list says damaged)'
CANARY = 'it-ran'


class Run:
    "A pickle that runs a command where it is read."
    def __reduce__(self): return os.system, (f'touch {CANARY}',)


class Make:
    "A pickle that calls any function by its name."
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    return preset('small', **TINY | dict(data=str(write_text(tmp_path_factory.mktemp('text')/'text.txt', lines=90)), max_steps=8))


@pytest.fixture(scope='module')
def good(config, tmp_path_factory): return Trainer(config, tmp_path_factory.mktemp('run')/'run', quiet=True).fit().run/'final_model.pt'


def members(path):
    with zipfile.ZipFile(path) as z: return {i.filename: z.read(i) for i in z.infolist()}


def zipped(path, files, how=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, 'w', how) as z: [z.writestr(zipfile.ZipInfo(n) if how == zipfile.ZIP_STORED else n, d) for n, d in files.items()]


def saved(path, **keys):
    "A checkpoint with other keys."
    with open(path, 'wb') as f: torch.save(load_checkpoint(saved.good) | keys, f)  # a path would name the members


def with_member(path, name, data): zipped(path, members(saved.good) | {name: data})


def with_pickle(path, change): zipped(path, {n: change(d) if n.endswith('data.pkl') else d for n, d in members(saved.good).items()})


def tar(path):
    "The format of 2016: a tar of pickles."
    with tarfile.open(path, 'w:') as t:
        for name in ('sys_info', 'pickle', 'tensors', 'storages'):
            data = pickle.dumps(Run())
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))


def legacy(path):
    "The format before the zip: pickles one after the other."
    torch.save(dict(x=Run()), path, _use_new_zipfile_serialization=False)


def with_value(opcodes):
    "A checkpoint with a value whose pickle is made by hand."
    def make(path):
        saved(path, software=dict(x='HERE'))
        files = members(path)
        assert files['archive/data.pkl'].count(b'X\4\0\0\0HERE') == 1
        files['archive/data.pkl'] = re.sub(rb'X\x04\x00\x00\x00HERE(q.|r....)', lambda _: opcodes, files['archive/data.pkl'], flags=re.S)
        zipped(path, files)
    return make


def tensor_that_claims(numel, stride=1, offset=0):
    "A tensor of four numbers that says it has others."
    def number(n): return b'\x8a\x08'+struct.pack('<q', n)
    def make(path):
        saved(path, software=dict(x=torch.arange(4.)))
        files = members(path)
        claim = b'Q'+number(offset)+number(numel)+b'\x85'+number(stride)+b'\x85'
        files['archive/data.pkl'], n = re.subn(rb'QK\x00K\x04\x85(q.|r....)K\x01\x85', lambda _: claim, files['archive/data.pkl'], flags=re.S)
        assert n == 1
        zipped(path, files)
    return make


def storage_that_claims(path):
    saved(path, software=dict(x=torch.arange(4.)))
    files = members(path)
    files['archive/data.pkl'], n = re.subn(rb'K\x04t(q.|r....)QK\x00K\x04\x85', lambda m: b'J\0\0\0\x10'+m[0][2:], files['archive/data.pkl'], flags=re.S)
    assert n == 1
    zipped(path, files)


def two_directories(path):
    "Python's reader takes the directory before the end, torch's the one that the end names: in that one is a bomb."
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, data in members(saved.good).items(): z.writestr(name, bytes(2**28) if name.endswith('/0') else data)
    inner = inner.getvalue()
    zipped(path, members(saved.good))
    data = path.read_bytes()
    end = data.rindex(b'PK\5\6')
    path.write_bytes(inner[:inner.rindex(b'PK\5\6')]+data[:end+16]+struct.pack('<LH', inner.index(b'PK\1\2'), 0))


def lying_size(path, size=2**40):
    "A member that claims a terabyte in its directory entry, as zip64 may."
    zipped(path, members(saved.good))
    data = bytearray(path.read_bytes())
    at = data.rfind(b'PK\1\2')
    data[at+20:at+28] = struct.pack('<LL', 2**32-2, 2**32-2)
    path.write_bytes(data)


def overlapping(path):
    "Every entry of the directory points to the same bytes: small on the disk, large when read."
    zipped(path, {'archive/data.pkl': b'x'*10_000_000, **{f'archive/data/{i}': b'' for i in range(500)}})
    data = path.read_bytes()
    with zipfile.ZipFile(path) as z: start, first = z.start_dir, z.infolist()[0]
    entry = data[start:start+46+len(first.filename)]
    entries = b''.join(entry[:28]+struct.pack('<H', len(n))+entry[30:46]+n for n in (b'archive/data.pkl', *(b'archive/data/%d' % i for i in range(500))))
    path.write_bytes(data[:start]+entries+b'PK\5\6'+bytes(4)+struct.pack('<HHLLH', 501, 501, len(entries), start, 0))


def symlink(path):
    info = zipfile.ZipInfo('archive/data/99')
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, 'w') as z:
        for n, d in members(saved.good).items(): z.writestr(zipfile.ZipInfo(n), d)
        z.writestr(info, '/etc/passwd')


def twice(path):
    with zipfile.ZipFile(path, 'w') as z:
        for n, d in (*members(saved.good).items(), ('archive/data.pkl', pickle.dumps(Run()))): z.writestr(zipfile.ZipInfo(n), d)


def bomb(path): zipped(path, members(saved.good) | {'archive/data/bomb': bytes(200*2**20)}, zipfile.ZIP_DEFLATED)
def opcode(code): return lambda path: with_pickle(path, lambda d: d[:2]+code+d[2:])


PAYLOADS = {
    '__reduce__': lambda p: saved(p, train_history=Run()),
    '__reduce__ in a tensor\'s place': lambda p: saved(p, model_state_dict={'embed.weight': Run()}),
    '__reduce__ as a key': lambda p: saved(p, lineage=[{'id': Run()}]),
    'eval': lambda p: saved(p, software=Make(eval, f'open("{CANARY}", "w")')),
    'exec in a list in a dict': lambda p: saved(p, val_history=[dict(step=1, loss=Make(exec, f'open("{CANARY}", "w")'))]),
    'getattr': lambda p: saved(p, software=Make(getattr, ExperimentConfig, '__init__')),
    'torch.load in torch.load': lambda p: saved(p, software=Make(torch.load, '/etc/passwd')),
    'another class': lambda p: saved(p, config=Make(type(zipfile.ZipInfo()), 'x')),
    'GLOBAL os system': opcode(b'cos\nsystem\n(X\x0c\0\0\0touch it-ran\0tR0'),
    'GLOBAL posix system': opcode(b'cposix\nsystem\n(X\x0c\0\0\0touch it-ran\0tR0'),
    'STACK_GLOBAL builtins exec': opcode(b'\x8c\x08builtins\x8c\x04exec\x93(\x8c\x01x\x85R0'),
    'INST': opcode(b'(X\x0c\0\0\0touch it-ranios\nsystem\n0'),
    'BUILD on a class': opcode(b'clmnb.config\nExperimentConfig\n}b0'),
    'EXT1': opcode(b'\x82\x01'),
    'persistent id': opcode(b'(X\x06\0\0\0systemtQ0'),
    'memo that grows': opcode(b'j\xff\xff\xff\x7f'),
    'a long of a gigabyte': opcode(b'\x8b'+struct.pack('<i', 2**30)),
    'a string of a gigabyte': opcode(b'X'+struct.pack('<I', 2**30)),
    'plain pickle': lambda p: p.write_bytes(pickle.dumps(Run())),
    'legacy torch': legacy, 'legacy tar': tar,
    'gzip': lambda p: p.write_bytes(zlib.compress(pickle.dumps(Run()))),
    'script': lambda p: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), p),
    '../ in a name': lambda p: with_member(p, '../../it-ran', b'x'),
    'an absolute name': lambda p: with_member(p, '/tmp/it-ran', b'x'),
    'a backslash': lambda p: with_member(p, 'archive\\..\\it-ran', b'x'),
    'two of one name': twice, 'a link as a member': symlink, 'compressed': bomb,
    'huge declared size': lying_size, 'overlapping members': overlapping, 'two directories': two_directories,
    'a storage beyond its member': storage_that_claims, 'a tensor beyond its storage': tensor_that_claims(10**12),
    'a tensor of stride 0': tensor_that_claims(10**12, 0), 'a negative stride': tensor_that_claims(4, -1), 'a far offset': tensor_that_claims(4, 1, 10**12),
    'a tensor of no device': lambda p: saved(p, software=dict(x=torch.empty(10**9, device='meta'))),
    'a sparse tensor': lambda p: saved(p, software=dict(x=torch.sparse_coo_tensor(size=(10**9, 10**9)))),
    'a key of two million tuples': with_value(b'})'+b'\x85'*2_000_000+b'Ns'), 'two million tuples': with_value(b')'+b'\x85'*2_000_000),
    'bytes of 2 GB': with_value(b'cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R'),
    'runpy': with_value(b'crunpy\nrun_path\nX\x01\0\0\0x\x85R'), 'torch.hub': with_value(b'ctorch.hub\nload\nX\x01\0\0\0x\x85R'),
    'a pickle of 65 MB': lambda p: with_pickle(p, lambda d: b'\x80\x02'+b'N0'*(33*2**20)+d[2:]),
    'deep description': lambda p: with_member(p, MEMBER, b'['*10**6),
    'huge description': lambda p: with_member(p, MEMBER, b' '*(20*2**20)+b'{}'),
    'wide description': lambda p: with_member(p, MEMBER, b'['+b'{},'*10**6+b'{}]'),
    'a view beyond its storage': lambda p: saved(p, model_state_dict={'embed.weight': Make(torch._utils._rebuild_tensor_v2, torch.zeros(2).untyped_storage(), 10**12, (3,), (1,), False, {})}),
    'lists that double': lambda p: saved(p, software=dict(x=doubled(24))),
    'a million keys': lambda p: saved(p, software={i: i for i in range(1_000_001)}),
    'negative steps': lambda p: saved(p, global_step=-5),
    'a history that runs backwards': lambda p: saved(p, train_history=[dict(step=3, loss=1.), dict(step=2, loss=1.)]),
    'a hostile field': lambda p: saved(p, config=vars(ExperimentConfig()) | dict(n_layer=2**13, n_embd=2**20, n_head=1)),
    'a field with code': lambda p: saved(p, config=vars(ExperimentConfig()) | dict(optimizer='__import__("os").system("touch it-ran")')),
    'data from elsewhere': lambda p: saved(p, data_state=dict(source=5, fingerprint=[], tokenizer={})),
    'a tokenizer that is none': lambda p: saved(p, data_state=dict(source='nowhere', fingerprint='a', tokenizer='{"model": {"type": "Code"}}')),
}


def doubled(n):
    x = []
    for _ in range(n): x = [x, x]
    return x


HARMLESS = {'a link as a member', 'deep description', 'huge description', 'wide description'}  # not looked at by who reads the numbers
LATER = {'a tokenizer that is none', 'a field with code'}  # refused by who uses it

SPECIAL = {
    'a pipe': os.mkfifo, 'a loop of links': lambda p: p.symlink_to(p.name), 'a folder': os.mkdir,
    'a device': lambda p: p.symlink_to('/dev/zero'), 'a link to a secret': lambda p: p.symlink_to('/etc/passwd'), 'nothing': lambda p: p.symlink_to('/nowhere'),
}


def bounded(act, folder):
    "Call `act` in a process of its own, in `folder`, with 300 MB more than it has and a minute at most; its code."
    def go():
        os.chdir(folder)
        now = int(open('/proc/self/statm').read().split()[0])*resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now+300*2**20,)*2)
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
        import signal
        signal.alarm(90)
        act()
        return 0
    code = forked(go, folder/'said.txt')
    assert code == 0, f'{code}\n{(folder/"said.txt").read_text()}'
    assert not any(folder.rglob(CANARY)) and not os.path.exists('/tmp/it-ran')


@pytest.mark.parametrize('what', [*PAYLOADS, *SPECIAL])
def test_checkpoints(row, good, tmp_path, what):
    row('hostile files', HELD)
    row.tried()
    saved.good, run = good, tmp_path/'run'
    run.mkdir()
    path = run/'checkpoint_step_9.pt'
    (PAYLOADS | SPECIAL)[what](path)
    def act():
        c = describe(path, check=True)
        assert c.error is None or '\n' not in c.error
        if what in HARMLESS: assert differences(load_checkpoint(path), load_checkpoint(good)) == []
        else:
            with pytest.raises((ValueError, OSError)) as e: Trainer.resume(path, tmp_path/'branch', quiet=True)
            assert '\n' not in str(e.value) and (what in LATER or path.name in str(e.value)), e.value
        for _ in range(2): runs_table(tmp_path), runs_tree(tmp_path)
        RunDir(run).latest(note=lambda _: None)
    bounded(act, tmp_path)


RUN_JSON = {
    'text': b'hello', 'deep': b'['*10**6, 'a list': b'[]', 'null': b'null', 'other types': json.dumps(dict(state=[], pid={}, step='x', max_steps=None)).encode(),
    'pid 1': json.dumps(dict(state='running', pid=1, pid_start=0, step=1, max_steps=2, host='HOST', heartbeat=9e12)).encode(),
    'a negative pid': json.dumps(dict(state='running', pid=-1, pid_start=0, step=1, max_steps=2, host='HOST', heartbeat=9e12)).encode(),
    'a huge pid': json.dumps(dict(state='running', pid=10**30, pid_start=10**400, step=10**400, max_steps=2, host='HOST')).encode(),
    'not a number': b'{"state": "running", "pid": 7, "step": NaN, "max_steps": Infinity, "heartbeat": NaN, "host": "HOST"}',
    'nobody there': json.dumps(dict(state='running', pid=2**22+5, pid_start=1, step=1, max_steps=2, host='HOST', heartbeat=0)).encode(),
    'an own state': json.dumps(dict(state='<b>x</b>', pid=1, step=1, max_steps=2, host='HOST', command=['<script>'])).encode(),
}


@pytest.mark.parametrize('what', RUN_JSON)
def test_run_json(row, tmp_path, what):
    "Nothing that a stranger writes there makes lmnb signal a process, or calls a run alive that is not."
    row('hostile files', HELD)
    row.tried()
    import socket
    run = tmp_path/'run'
    run.mkdir()
    (run/'run.json').write_bytes(RUN_JSON[what].replace(b'HOST', socket.gethostname().encode()))
    def act():
        os.kill = lambda *a: 1/0
        assert not condition(run).alive
        for kill in (False, True):
            with pytest.raises(RuntimeError, match='nothing runs in'): stop(run, kill=kill)
        runs_table(tmp_path)
        with RunDir(run).locked(): pass
    bounded(act, tmp_path)


def test_lineages_and_events(row, good, tmp_path):
    "Event lines that contradict each other, name themselves as their own past, or are a hundred megabytes long."
    row('hostile files', HELD)
    line = [dict(id='a', parent='a', from_step=0)]
    hostile = [dict(kind='start', segment='a', lineage=line*1000, max_steps='x', config={}, plan=[]), dict(kind='resume', segment='b', lineage=[dict(id='b', from_step=10**30)]),
               dict(kind='train', segment='a', step=-10**18, loss='NaN', lr=[], grad_norm={}, tokens='x', time=None), dict(kind='warn', segment='a', text=['<img src=x>'], step='x'),
               dict(kind='val', segment='a', step=3, loss='1e999'), dict(kind='save', segment='a', names='x', step=None), dict(kind='end', segment='a')]
    for i, lines in enumerate((hostile, hostile[::-1], hostile*50)):
        row.tried()
        run = tmp_path/str(i)/'run'
        run.mkdir(parents=True)
        (run/'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines))+'\n')
        def act():
            load_history(run), Tail(run/'metrics.jsonl').update(), runs_table(run.parent)
        bounded(act, run.parent)
    row.tried()
    run = tmp_path/'long'
    run.mkdir()
    with open(run/'metrics.jsonl', 'wb') as f: f.truncate(100*2**20)  # zeros, without an end
    def act():
        for _ in range(3): Tail(run/'metrics.jsonl').update()
    bounded(act, run)


@pytest.mark.parametrize('what', ['a pipe', 'a loop of links', 'a folder', 'a device', 'odd bytes', 'ids that are too large', 'a tokenizer with code'])
def test_token_folders(row, tmp_path, what):
    row('hostile files', HELD)
    row.tried()
    (tmp_path/'bin').mkdir()
    path, tok = tmp_path/'bin'/'train.bin', tmp_path/'tok.json'
    tok.write_text(load_corpus(preset('small', **TINY | dict(data=str(write_text(tmp_path/'t.txt', lines=90)))), note=lambda _: None).tokenizer)
    if what in SPECIAL: SPECIAL[what](path)
    else: path.write_bytes(dict([('odd bytes', b'x'*9999)]).get(what, b'\xff'*10_000))
    if what == 'a tokenizer with code': tok.write_text('{"model": {"type": "BPE", "__reduce__": "os.system"}, "version": []}')
    def act():
        with pytest.raises((ValueError, OSError)) as e: load_corpus(preset('small', **TINY | dict(data=str(tmp_path/'bin'), tokenizer=str(tok))), note=lambda _: None)
        assert '\n' not in str(e.value)
    bounded(act, tmp_path)


NASTY = '<img src=x onerror=alert(1)><script>alert(2)</script>"\'>&amp;'


def test_names_in_the_panel(row, good, tmp_path, capsys):
    "A run's folder, its events, its log and its settings say HTML: what the panel shows is text."
    row('hostile files', HELD)
    row.tried()
    run = tmp_path/f'{NASTY}\x1b[2J'.replace('/', '∕')
    run.mkdir()
    state = load_checkpoint(good)
    state['config'] = ExperimentConfig(**vars(state['config']) | dict(data=NASTY))
    torch.save(state | dict(software=dict(torch=NASTY, device=NASTY)), run/'checkpoint_step_8.pt')
    line = state['lineage']
    events = [dict(kind='start', segment=line[0]['id'], lineage=line, max_steps=8, command=[NASTY], config=dict(data=NASTY), versions={NASTY: NASTY}),
              dict(kind='train', segment=line[0]['id'], step=1, loss=2., lr=1.), dict(kind='warn', segment=line[0]['id'], step=1, code=NASTY, text=NASTY)]
    (run/'metrics.jsonl').write_text(''.join(json.dumps(e)+'\n' for e in events))
    (run/'train.log').write_text(f'{NASTY}\n\x1b[2J{NASTY}\n')
    (run/'run.json').write_text(json.dumps(dict(state='failed', pid=1, step=1, max_steps=8, host=NASTY, command=[NASTY])))
    panel = lmnb.panel.ResumePanel(tmp_path)
    try:
        for _ in range(3): panel.refresh()
        for run in panel.run.options: panel.run.value = run[1]; panel.refresh()
        texts = [t for w in panel.whole for t in html_of(w)]
    finally: panel.close()
    assert sum('&lt;img' in t for t in texts) >= 2
    for t in texts: assert '<img src=x' not in t and '<script>' not in t and 'Error' not in t, t
    say(runs_table(tmp_path)+runs_tree(tmp_path))
    assert '\x1b' not in capsys.readouterr().out


def html_of(widget):
    "The value of every HTML widget below."
    from ipywidgets import HTML
    out = [widget.value] if isinstance(widget, HTML) else []
    for c in getattr(widget, 'children', ()): out += html_of(c)
    return out
