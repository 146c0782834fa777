"""The power fails: from the order of writes, syncs and renames follow the states that a journaling file system may leave.

A journal keeps the order of names (renames, links, deletions), so that any first part of them may be there, but all that
came before a folder's sync. Of a file's contents is there what was synced; else nothing, a part, or zeros.
"""
import os
import shutil
import stat
import threading
from itertools import product

import pytest
from conftest import write_text
from exact import TINY

import lmnb.checkpoint
from lmnb import Trainer, preset
from lmnb.rundir import RunDir


class Record:
    "All that is done to names and syncs below `root`, in order; contents by file, since a file has many names."
    def __init__(self, root, monkeypatch):
        self.root, self.ops, self.data, self.files, self.lock = root, [], {}, {}, threading.RLock()
        for name in ('replace', 'link', 'unlink', 'mkdir', 'fsync'): monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name)))

    def below(self, path): return str(path).startswith(str(self.root))

    def wrap(self, name, f):
        def call(a, *rest, **k):
            with self.lock:
                if name == 'fsync': return self.sync(a, f)
                if not self.below(a) or name == 'mkdir' and os.path.isdir(a): return f(a, *rest, **k)
                if name != 'mkdir' and str(a) not in self.files and os.path.exists(a): self.born(a)
                f(a, *rest, **k)
                self.ops.append((name, str(a), *map(str, rest[:1] if name in ('replace', 'link') else ())))
                if name in ('replace', 'link'): self.files[str(rest[0])] = self.files[str(a)]
                if name in ('replace', 'unlink'): self.files.pop(str(a), None)
        return call

    def born(self, path):
        "A file is seen for the first time; what it holds by now."
        n = self.files[str(path)] = len(self.data)
        self.data[n] = open(path, 'rb').read()
        self.ops.append(('create', str(path), n))

    def sync(self, fd, f):
        path = os.readlink(f'/proc/self/fd/{fd}')
        f(fd)
        if not self.below(path): return
        if stat.S_ISDIR(os.fstat(fd).st_mode): self.ops.append(('sync folder', path))
        else:
            if path not in self.files: self.born(path)
            self.data[self.files[path]] = open(path, 'rb').read()
            self.ops.append(('sync', path, self.files[path]))


def names_after(ops):
    "Names to files after these operations."
    names = {}
    for op, a, *b in ops:
        if op == 'create': names[a] = b[0]
        if op == 'link': names[b[0]] = names[a]
        if op == 'replace': names[b[0]] = names.pop(a)
        if op == 'unlink': names.pop(a, None)
    return names


TORN = dict(whole=lambda d: d, empty=lambda d: b'', part=lambda d: d[:len(d)//2], zeros=lambda d: bytes(len(d)))


def states(ops, data, every):
    "After each `every`-th operation, each state that may be left: how many operations were done, and the files."
    for done in range(1, len(ops)+1, every):
        synced = {b[0] for op, _, *b in ops[:done] if op == 'sync'}
        least = max((i+1 for i, (op, *_) in enumerate(ops[:done]) if op == 'sync folder'), default=0)
        for kept, torn in product(range(least, done+1), TORN):
            names = names_after(ops[:kept])
            if torn != 'whole' and set(names.values()) <= synced: continue
            yield done, {p: data[n] if n in synced else TORN[torn](data[n]) for p, n in names.items()}


@pytest.fixture
def config(tmp_path):
    return preset('small', **TINY | dict(data=str(write_text(tmp_path/'text.txt', lines=90)), max_steps=16, save_interval=4, keep_last=2))


def life(config, run):
    "A run, extended from its trunk, gone back in, and set aside (as the third): every way in which files get and lose names."
    Trainer(config, run, quiet=True).fit()
    Trainer.resume('trunk', run, extend_steps=24, quiet=True).fit()
    Trainer.resume('20', run, extend_steps=28, quiet=True).fit(max_minutes=1e-9)
    Trainer.resume('latest', run, quiet=True).fit()
    Trainer(config, run, new_run=True, quiet=True).fit(max_minutes=1e-9)


def recorded(config, run, monkeypatch):
    "Operations and contents of a life; `finished` has, for each checkpoint, the operation after which it was called saved."
    finished = []
    with monkeypatch.context() as m:
        record = Record(run, m)
        write = lmnb.checkpoint.write_checkpoint
        def noted(state, folder, names):
            size = write(state, folder, names)
            finished.append((len(record.ops), str(folder/names[0])))
            return size
        m.setattr(lmnb.checkpoint, 'write_checkpoint', noted)
        life(config, run)
    return record, finished


def check(record, finished, root, every, resume):
    "Number of states tried; each is put on the disk, and must be a run to go on with."
    n = 0
    for done, files in states(record.ops, record.data, every):
        n += 1
        shutil.rmtree(root, ignore_errors=True)
        for p, d in files.items():
            path = root/os.path.relpath(p, record.root)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(d)
        living = RunDir(root).living(check=True)
        assert not [c.error for c in living if c.error]
        saved = [p for at, p in finished if at <= done]
        if saved and not (root/'superseded/3').exists(): assert living, f'after {record.ops[done-1]} nothing is left of {saved}'
        for at, p in finished:  # called saved, and not taken away since
            if at <= done and not any(op in ('replace', 'unlink') and p in rest for op, *rest in record.ops[at:done]): assert p in files
        if n % resume == 0: Trainer.resume('latest-or-new', root, config=record.config, quiet=True).fit(max_minutes=1e-9)
    return n


HELD = 'in every state that the order of writes, syncs and renames allows: no half file, `latest` goes on, what was called saved is there'


def test_power_cut(row, times, config, tmp_path, monkeypatch):
    row('power cut', HELD)
    record, finished = recorded(config, tmp_path/'run', monkeypatch)
    record.config = config
    assert len(finished) > 10 and len(record.ops) > 100
    row.tried(check(record, finished, tmp_path/'after', times(5, 1), times(60, 15)))


@pytest.mark.parametrize('left_out', ['sync', 'sync folder'])
def test_a_fault_is_seen(row, config, tmp_path, monkeypatch, left_out):
    "The same life, had these calls not been made."
    row('power cut', HELD)
    record, finished = recorded(config, tmp_path/'run', monkeypatch)
    record.ops = [('nothing', '') if op[0] == left_out else op for op in record.ops]
    with pytest.raises(AssertionError): check(record, finished, tmp_path/'after', 1, 10**9)
