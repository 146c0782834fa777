"Disks that fill, refuse, break or go away: what was there stays, one line says it, training goes on, and what the disk owes comes later."
import builtins
import errno
import io
import os
import resource
import shutil
import subprocess

import filelock._unix
import pytest
from conftest import write_text
from exact import TINY, forked

import lmnb.checkpoint
import lmnb.history
from lmnb import Trainer, load_checkpoint, load_history, preset
from lmnb.check import differences
from lmnb.history import read_events
from lmnb.rundir import RunDir
from lmnb.trainer import TrainingFailed

PAST = ('lineage', 'software')  # differ between two runs


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    text = write_text(tmp_path_factory.mktemp('text')/'text.txt', lines=90)
    return preset('small', **TINY | dict(data=str(text), max_steps=24, save_interval=4))


@pytest.fixture(scope='module')
def straight(config, tmp_path_factory): return Trainer(config, tmp_path_factory.mktemp('straight')/'run', quiet=True).fit().run.path


@pytest.fixture
def disk(tmp_path):
    "A file system of 800 kB, which two checkpoints fill."
    mount = tmp_path/'disk'
    mount.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=800k', 'tmpfs', mount], capture_output=True).returncode:
        pytest.skip('mounting is not permitted here')
    yield mount
    subprocess.run(['umount', '-l', mount], check=True)


def at(trainer, deeds):
    "Do what `deeds` says, by step, before the step is made."
    train_step = trainer.engine.train_step
    def step(k, lr):
        if k in deeds: deeds[k]()
        return train_step(k, lr)
    trainer.engine.train_step = step
    return trainer


def fill(folder):
    with open(folder/'filler', 'ab', buffering=0) as f:
        try:
            while f.write(b'\0'*4096): pass
        except OSError: pass


def ended(trainer):
    "Train; the failure that it ended by, or None."
    try: trainer.fit()
    except TrainingFailed as e: return str(e)


def all_is_well(run, straight, known=()):
    "Every file is whole, those that were there before are as they were, and the end is the straight run's."
    living = RunDir(run).living(check=True)
    assert living and not any(c.error for c in living) and not list(run.glob('.tmp-*'))
    for path, data in dict(known).items(): assert path.read_bytes() == data
    final = load_checkpoint(run/'final_model.pt')
    assert differences(final, load_checkpoint(straight/'final_model.pt'), PAST) == []


def events(run, kind): return [e for e in read_events(run/'metrics.jsonl')[0] if e['kind'] == kind]  # a torn line is skipped


def each_step_once(run, n=24): assert load_history(run).train['step'].tolist() == list(range(1, n+1))


def warned(run, *codes):
    "Not one warning a step: at most one of each kind while the trouble lasts."
    assert sorted({e['code'] for e in events(run, 'warn')}) == sorted(codes)
    assert len(events(run, 'warn')) <= len(codes)+1


def refusing(folder, monkeypatch, number, reads=True):
    "A folder whose every call fails, or every one that changes something; returns what begins that and what ends it."
    state = dict(on=False)
    def wrapped(name, f):
        def call(path, *a, **k):
            mode = a[0] if name == 'open' and a else k.get('mode', 'r')
            changes = set(mode) & set('wax+') if isinstance(mode, str) else mode & (os.O_WRONLY | os.O_RDWR)
            hit = reads or (changes if name == 'open' else name in ('replace', 'link', 'unlink', 'mkdir', 'truncate'))
            if state['on'] and hit and isinstance(path, (str, os.PathLike)) and str(path).startswith(str(folder)):
                raise OSError(number, os.strerror(number), str(path))
            return f(path, *a, **k)
        return call
    for name in ('stat', 'lstat', 'open', 'replace', 'link', 'unlink', 'mkdir', 'listdir', 'scandir', 'statvfs', 'access', 'truncate'):
        monkeypatch.setattr(os, name, wrapped(name, getattr(os, name)))
    for module in (builtins, io): monkeypatch.setattr(module, 'open', wrapped('open', module.open))
    return lambda: state.update(on=True), lambda: state.update(on=False)


@pytest.fixture
def trouble(request, monkeypatch):
    "A folder on a disk that fills, or that a kernel takes for reading alone; what begins it and what ends it."
    if request.param == 'full':
        folder = request.getfixturevalue('disk')
        return folder, lambda t: fill(folder), (folder/'filler').unlink
    folder = request.getfixturevalue('tmp_path')
    begin, end = refusing(folder, monkeypatch, errno.EROFS, reads=False)
    return folder, lambda t: (t.events._let_go(), begin()), end


def known_then(t, begin, names):
    "Let trouble begin once nothing is being written; the files that were there, and their bytes."
    t.writer.wait()
    known = {p: p.read_bytes() for p in t.run.path.glob(names)}
    begin(t)
    return known


@pytest.mark.parametrize('first', [3, 4, 10, 21])
@pytest.mark.parametrize('trouble', ['full', 'read-only'], indirect=True)
def test_a_disk_that_comes_back(row, trouble, config, straight, first):
    row('disk full, read-only', 'older files as they were, one warning, training goes on; all is written when there is room')
    row.tried()
    (disk, begin, end), known = trouble, {}
    run = disk/'run'
    t = Trainer(config, run, quiet=True)
    at(t, {first: lambda: known.update(known_then(t, begin, 'checkpoint_step_*.pt')), 23: end})
    assert ended(t) is None
    all_is_well(run, straight, known)
    each_step_once(run)
    warned(run, *['disk']*(disk.name == 'disk'), *['save']*(first < 20))  # `disk`: said before the first step, there is little room


@pytest.mark.parametrize('trouble', ['full', 'read-only'], indirect=True)
def test_a_disk_that_does_not(row, trouble, config, straight):
    row('disk full, read-only', 'older files as they were, one warning, training goes on; all is written when there is room')
    row.tried()
    (disk, begin, end), known = trouble, {}
    run = disk/'run'
    t = Trainer(config, run, quiet=True)
    at(t, {10: lambda: known.update(known_then(t, begin, '*.pt'))})
    told = ended(t)
    assert 'not stored in' in told and 'final_model.pt' in told and 'events' in told and 'older files stand' in told
    assert t.step == 24 and len(known) == 3 and all(p.read_bytes() == d for p, d in known.items())
    end()
    Trainer.resume('latest', run, quiet=True).fit()
    all_is_well(run, straight)
    each_step_once(run)


def test_quota(row, times, config, straight, tmp_path):
    "No file may grow beyond a size, for some steps or to the end; checkpoints and event lines meet it."
    row('quota (RLIMIT_FSIZE)', 'as above; a run whose last save fails ends with exit 1')
    for limit in (0, 1000, 9000, 20_000)[:times(2, 4)]:
        for ends in (True, False):
            row.tried()
            run = tmp_path/f'{limit}{ends}'
            def act():
                def limited(n): return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))
                t = at(Trainer(config, run, quiet=True), {10: limited(limit), 20: limited(resource.RLIM_INFINITY if ends else limit)})
                told = ended(t)
                limited(resource.RLIM_INFINITY)()
                return 1 if told else 0
            assert forked(act, tmp_path/'said.txt') == (0 if ends else 1), (tmp_path/'said.txt').read_text()
            if not ends: Trainer.resume('latest', run, quiet=True).fit()
            all_is_well(run, straight)
            each_step_once(run)


class Broken:
    "A file that refuses its write or sync of that number, once; a part of what was to be written may have been."
    left = None  # operations until one fails, over all files

    def __init__(self, file): self.file = file
    def __getattr__(self, name): return getattr(self.file, name)
    def __enter__(self): return self
    def __exit__(self, *a): self.file.close()
    def __iter__(self): return iter(self.file)

    @classmethod
    def pulse(cls):
        if cls.left is not None: cls.left -= 1
        return cls.left == 0

    def write(self, data):
        if not self.pulse(): return self.file.write(data)
        self.file.write(bytes(data)[:len(bytes(data))//2])
        raise OSError(errno.EIO, 'Input/output error')


def break_files(monkeypatch, *modules):
    def opened(path, mode='r', *a, **k):
        f = builtins.open(path, mode, *a, **k)
        return Broken(f) if set(mode) & set('wa+') else f
    for m in modules: monkeypatch.setattr(m, 'open', opened, raising=False)


@pytest.mark.parametrize('what', ['checkpoint', 'events', 'fsync'])
def test_io_errors(row, times, config, straight, tmp_path, monkeypatch, what):
    row('I/O error', 'at any write or sync: no half file under a name, and the next try is whole')
    break_files(monkeypatch, lmnb.history if what == 'events' else lmnb.checkpoint)
    if what == 'fsync':
        def fsync(fd, real=os.fsync):
            if Broken.pulse(): raise OSError(errno.EIO, 'Input/output error')
            real(fd)
        monkeypatch.setattr(lmnb.checkpoint.os, 'fsync', fsync)
    def life(left):
        run = tmp_path/f'{what}{left}'
        Broken.left = left
        told = ended(Trainer(config, run, quiet=True))
        assert told is None, told
        all_is_well(run, straight)
        each_step_once(run)
        used, Broken.left = Broken.left, None
        return used
    n = 10**6-life(10**6)  # operations in a life
    for k in range(1, n+1, max(1, n//times(6, 60))):
        row.tried()
        life(k)
    assert n > (15 if what == 'fsync' else 30)


def moved(run):
    "The mount point is left, empty."
    def go(): run.rename(run.parent/'away'); run.mkdir()
    def back(): run.rmdir(); (run.parent/'away').rename(run)
    return go, back


def replaced(run):
    "What comes back bears other numbers, as a drive that is mounted anew does."
    def go(): run.rename(run.parent/'away')
    def back(): shutil.copytree(run.parent/'away', run); shutil.rmtree(run.parent/'away')
    return go, back


@pytest.mark.parametrize('first, last', [(2, 3), (3, 10), (9, 23), (24, 24), (10, 99)])
@pytest.mark.parametrize('how', ['dead', 'moved', 'replaced'])
def test_a_drive_that_goes_away(row, config, straight, tmp_path, monkeypatch, capsys, how, first, last):
    row('drive away, for seconds or for good', 'one warning; events are kept; nothing is made at an empty mount point; the end names what is not stored')
    row.tried()
    run = tmp_path/'run'
    go, back = refusing(run, monkeypatch, errno.ENOTCONN) if how == 'dead' else dict(moved=moved, replaced=replaced)[how](run)
    t = Trainer(config, run, quiet=True)
    told = ended(at(t, {last: back, first: lambda: (t.writer.wait(), t._collect(), go())}))
    if last > first and last <= 24: assert told is None
    else: assert 'not stored in' in told and 'final_model.pt' in told and 'events' in told
    said = capsys.readouterr().out.splitlines()
    assert len([l for l in said if 'Events cannot be written' in l]) == 1 and len(said) <= 6, said
    if told and how == 'moved': assert list(run.iterdir()) == []
    if told and how == 'replaced': assert not run.exists()
    if told:
        back()
        Trainer.resume('latest', run, quiet=True).fit()
    all_is_well(run, straight)
    each_step_once(run)


def test_another_run_at_the_path(row, config, tmp_path):
    "The folder is replaced by that of another run: not a byte of it changes."
    row('folder removed or replaced', 'nothing is written into another folder; the end names what is not stored')
    row.tried()
    run, other = tmp_path/'run', Trainer(config, tmp_path/'other', quiet=True).fit().run.path
    def tree(folder): return {p.name: p.read_bytes() for p in folder.iterdir()}
    before = tree(other)
    t = Trainer(config, run, quiet=True)
    at(t, {10: lambda: (t.writer.wait(), run.rename(tmp_path/'away'), other.rename(run))})
    assert 'not stored in' in ended(t)
    assert tree(run) == before


@pytest.mark.parametrize('when', [1, 5, 24])
def test_a_folder_that_is_removed(row, config, tmp_path, when):
    row('folder removed or replaced', 'nothing is written into another folder; the end names what is not stored')
    row.tried()
    t = Trainer(config, tmp_path/'run', quiet=True)
    assert 'not stored in' in ended(at(t, {when: lambda: (t.writer.wait(), shutil.rmtree(tmp_path/'run'))}))
    assert t.step == 24 and not (tmp_path/'run').exists()


@pytest.mark.parametrize('gone', [False, True])
def test_a_relative_path_after_chdir(row, config, straight, tmp_path, monkeypatch, gone):
    "The process goes elsewhere in the middle of a run; what it left may be removed behind it, too."
    row('chdir during a run', 'the run stays where it began; nothing is made elsewhere')
    row.tried()
    for d in ('here', 'there'): (tmp_path/d).mkdir()
    monkeypatch.chdir(tmp_path/'here')
    run = 'runs/a' if not gone else '../runs/a'
    t = at(Trainer(config, run, quiet=True), {6: lambda: (os.chdir(tmp_path/'there'), gone and (tmp_path/'there').rmdir())})
    assert ended(t) is None
    home = tmp_path/('runs/a' if gone else 'here/runs/a')
    all_is_well(home, straight)
    each_step_once(home)
    assert gone or list((tmp_path/'there').iterdir()) == []


def test_a_poor_file_system(row, config, straight, tmp_path, monkeypatch):
    "No locks, no links, no syncing of folders, and a reader that forbids a rename for a moment: slower, but all of it."
    row('a poor file system', 'no flock, no links, no folder sync, renames refused for a while: works, said once')
    def refuse(number): return lambda *a, **k: (_ for _ in ()).throw(OSError(number, os.strerror(number)))
    def fsync(fd, real=os.fsync): return refuse(errno.EINVAL)() if os.path.isdir(f'/proc/self/fd/{fd}') else real(fd)
    tries = dict(n=0)
    def replace(a, b, real=os.replace):
        tries['n'] += 1
        if tries['n'] % 4 == 1: raise PermissionError(errno.EACCES, 'a reader holds it')
        real(a, b)
    for owner, name, f in ((os, 'link', refuse(errno.EPERM)), (os, 'fsync', fsync), (os, 'replace', replace),
                           (filelock._unix.fcntl, 'flock', refuse(errno.ENOSYS))):
        monkeypatch.setattr(owner, name, f)
    run = tmp_path/'run'
    Trainer(config, run, quiet=True).fit(max_minutes=0)
    for goal in (None, 40):
        row.tried()
        Trainer.resume('trunk' if goal else 'latest', run, extend_steps=goal, quiet=True).fit()
        if not goal: all_is_well(run, straight)
    [told] = {e['text'] for e in events(run, 'warn')}
    assert len(events(run, 'warn')) == 3 and all(word in told for word in ('hard links', 'syncing', 'locks'))  # once a start
    assert not any(c.error for c in RunDir(run).living(check=True)) and load_checkpoint(run/'final_model.pt')['global_step'] == 40


def test_a_token_cache_without_room(row, disk, config, monkeypatch, tmp_path):
    row('disk full under caches and logs', 'one line, nothing half-made is left; a log that cannot be written costs no training')
    monkeypatch.setenv('LMNB_CACHE', str(disk))
    fill(disk)
    for _ in range(2):
        row.tried()
        with pytest.raises(OSError) as e: Trainer(config, tmp_path/'run', quiet=True)
        assert e.value.errno == errno.ENOSPC
        assert not [p for p in disk.iterdir() if p.name != 'filler' and p.suffix != '.lock']
    (disk/'filler').unlink()
    assert Trainer(config, tmp_path/'run', quiet=True).fit().step == 24


def test_a_log_without_room(row, disk, config, straight, tmp_path):
    row('disk full under caches and logs', 'one line, nothing half-made is left; a log that cannot be written costs no training')
    row.tried()
    run = tmp_path/'run'
    def act():
        os.dup2(os.open(disk/'log', os.O_WRONLY | os.O_CREAT), 1)
        __import__('sys').stdout = os.fdopen(1, 'w')
        fill(disk)
        Trainer(config, run).fit()
        return 0
    assert forked(act, tmp_path/'said.txt') == 0, (tmp_path/'said.txt').read_text()
    all_is_well(run, straight)
