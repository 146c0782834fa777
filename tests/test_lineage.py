"Whatever is done to a folder of runs: no finished checkpoint is lost but by `keep_last`, each says truly where it came from, and so do the plots."
import hashlib
import shutil
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import pytest
from conftest import write_text
from exact import TINY, forked, train, wrap
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import lmnb.engine
import lmnb.rundir
import lmnb.runs
from lmnb import Trainer, load_checkpoint, load_history, preset
from lmnb.checkpoint import Checkpoint, Writer, describe
from lmnb.config import override
from lmnb.engine import Engine
from lmnb.history import read_events
from lmnb.rundir import _STEP, AUTO, WORDS, RunDir, is_ancestor, step_name
from lmnb.runs import family
from lmnb.trainer import new_id

KINDS = ('SIGTERM', 'kill -9 in a step', 'kill -9 in half a file', 'kill -9 between two names', 'in an evaluation', 'disk full')
FOLDERS = ('a', 'b', 'c')
KEEP = (None, None, 0, 2, 2, 3)
ALIEN = step_name(999_999)  # a name that no session writes


@dataclass(frozen=True)
class Deed:
    "One command: a new run (`file` None) or a resume of the file of that number, and how it ends (`rm`: the user deletes that file)."
    folder: str           # of a new run or a branch; '' for a resume where the file lies
    file: int = None
    total: int = 0        # steps more, or fewer, than the file's plan has
    new_run: bool = False
    how: str = None
    after: int = 5
    keep_last: int = None  # None: as the checkpoint has it
    alien: bool = False   # whether somebody copies a file of another lineage into the folder meanwhile


more = dict(keep_last=st.sampled_from(KEEP), alien=st.sampled_from((False, False, True)))
resumes = st.builds(Deed, st.sampled_from(('', '', '', *FOLDERS)), st.integers(0, 99), st.integers(-12, 20), how=st.sampled_from((None, *KINDS)),
                    after=st.integers(1, 12), **more)
starts = st.builds(Deed, st.sampled_from(FOLDERS), new_run=st.booleans(), how=st.sampled_from((None, *KINDS)), after=st.integers(1, 20), **more)
deletions = st.builds(Deed, st.just(''), st.integers(0, 99), how=st.just('rm'))
lives = st.lists(st.one_of(resumes, resumes, resumes, starts, deletions), min_size=3, max_size=9)


def key(step, line, *_): return step, *(s['id'] for s in line)


def may_be_pruned(step, line, mine):
    "Whether the session that began by the event `mine` keeps so few: it is of its lineage, and enough later ones of that are there."
    if not mine or not (keep := mine['config']['keep_last']): return False
    end = Checkpoint(None, step=10**9, lineage=mine['lineage'])
    later = [c for c in RunDir(mine['run']).living() if c.step > step and _STEP.fullmatch(c.path.name) and is_ancestor(c, end)]
    return is_ancestor(Checkpoint(None, step=step, lineage=line), end) and len(later) >= keep


class World:
    "A folder of runs, and what is known of every checkpoint that was ever finished in it."
    def __init__(self, root, text):
        self.root, self.files, self.excused = root, {}, set()
        root.mkdir(exist_ok=True)
        self.config = preset('small', **TINY | dict(data=str(text), max_steps=20, dropout=.2))
        World.judge = Trainer(self.config, root/'judge', quiet=True).engine  # evaluates; never trains

    def paths(self): return sorted(self.root.rglob('[!.]*.pt'), key=str)

    def do(self, deed):
        "Run one command in a process of its own, and look at everything that is there afterwards."
        paths = self.paths()
        if deed.file is not None and not paths: return 'nothing there'
        path = None if deed.file is None else paths[deed.file % len(paths)]
        if deed.how == 'rm':
            path.unlink()
            gone = self.files.pop(path)
            if key(*gone[2:]) not in {key(*f[2:]) for f in self.files.values()}: self.excused.add(key(*gone[2:]))
            return 'deleted'
        keep = {} if deed.keep_last is None else dict(keep_last=deed.keep_last)
        def prepare(**kw):
            if path is None: t = Trainer(override(self.config, **keep), self.root/deed.folder, new_run=deed.new_run, **kw)
            else:
                total = describe(path).max_steps+deed.total
                t = Trainer.resume(path, self.root/deed.folder if deed.folder else None, extend_steps=total if deed.total else None, **keep, **kw)
            if alien: wrap(lmnb.engine, 'get_batch', lambda *a: self.put(alien, t.run/ALIEN))
            return t
        def act():
            try: return train(prepare, self.root/'batches.txt', deed.how, deed.after)
            except (ValueError, FileNotFoundError) as e: print(f'refused: {e}'); return 2
        before, began = self.files, self.begun()
        alien = deed.alien and next((p.read_bytes() for p in paths if _STEP.fullmatch(p.name) and not (path and is_ancestor(describe(p), describe(path)))), None)
        came_from = load_checkpoint(path, note=lambda _: None) if path else None
        (self.root/'put').unlink(missing_ok=True)
        code = forked(act, self.root/'said.txt')
        assert code in (0, 1, 2, 3, -9), (self.root/'said.txt').read_text()
        self.files = {p: self.known(p) for p in self.paths()}
        if code == 2: assert self.files == before
        mine = next((e for e in self.begun() if e not in began), None)  # None: refused, nothing to do, or killed at once
        if mine and keep: assert mine['config']['keep_last'] == deed.keep_last
        if (self.root/'put').exists(): assert (mine['run']/ALIEN).exists(), 'a file of another lineage is gone'
        self.nothing_is_lost(before, mine)
        self.all_is_true(before, came_from)
        if code in (0, 3) and deed.folder: self.best_is_best(self.root/deed.folder)
        return code

    def known(self, path):
        "What tells one checkpoint from another: its bytes; its step and weights; whether its loss is known."
        state = load_checkpoint(path, note=lambda _: None)  # every byte is checked
        weights = hashlib.sha256(b''.join(t.numpy().tobytes() for t in state['model_state_dict'].values())).hexdigest()
        return hashlib.sha256(path.read_bytes()).hexdigest(), weights, state['global_step'], state['lineage'], state['val_loss']

    def put(self, alien, to):
        "Put a file to where a run is at work, unless the disk is full; once."
        if to.exists(): return
        with suppress(OSError):
            (self.root/'copy').write_bytes(alien)
            (self.root/'copy').replace(to)
            (self.root/'put').touch()

    def begun(self):
        "The start and resume events of all that was ever begun, each with the folder of its file."
        files = sorted(self.root.rglob('metrics.jsonl'))
        return [e | dict(run=f.parent) for f in files for e in read_events(f)[0] if e['kind'] in ('start', 'resume')]

    def nothing_is_lost(self, before, mine):
        "No file is gone but by `keep_last`; none elsewhere, set aside or of another lineage; no name but to another file."
        run, here, states = mine and mine['run'], {f[0] for f in self.files.values()}, {f[1:3] for f in self.files.values()}
        for p, (bytes_, weights, step, line, val_loss) in before.items():
            if 'superseded' in p.parts: assert p.exists(), f'{p} is gone'
            names = {q.name for q, f in before.items() if f[0] == bytes_}
            aside = any('superseded' in q.parts for q, f in self.files.items() if f[0] == bytes_)
            if p.parent == run and p.name in WORDS.values(): assert p.exists() or aside, f'{p} is gone'
            if bytes_ in here or names <= {AUTO, WORDS['best']}: continue
            if val_loss is None and (weights, step) in states: continue  # written again once it was evaluated
            assert p.parent == run and may_be_pruned(step, line, mine), f'{names} is gone'
        lines, there = {e['segment']: e['lineage'] for e in self.begun()}, {key(*f[2:]) for f in self.files.values()}
        for e in (e for f in self.root.rglob('metrics.jsonl') for e in read_events(f)[0] if e['kind'] == 'save'):
            if mine and e['segment'] == mine['segment']: assert all((run/n).exists() for n in e['names'] if n in WORDS.values()), e['names']
            k, line = key(e['step'], lines[e['segment']]), lines[e['segment']]  # files that this session both made and pruned, too
            if k in there | self.excused or step_name(e['step']) not in e['names']: continue
            assert may_be_pruned(e['step'], line, mine), f'{k} is gone'
            self.excused.add(k)

    def all_is_true(self, before, came_from):
        "New files descend from the one that was resumed; a loss is that of the weights; the tree holds every file once."
        old = {f[0] for f in before.values()}
        new = [load_checkpoint(p, note=lambda _: None) for p, f in self.files.items() if f[0] not in old]
        line, step = (came_from['lineage'], came_from['global_step']) if came_from else ([], 0)
        for c in new:
            *earlier, last = c['lineage']
            assert earlier == line and last['from_step'] == step <= c['global_step'] and last['parent'] == (line[-1]['id'] if line else None)
        assert len({c['lineage'][-1]['id'] for c in new}) <= 1
        for c in new:
            if c['val_loss'] is None: continue
            self.judge.load(c, 'a file')
            assert self.judge.evaluate() == c['val_loss'] >= c['best_val_loss']
        self.the_tree_is_true()

    def the_tree_is_true(self):
        "Every file stands in it once, below its nearest ancestor."
        drawn, pairs = [], []
        def walk(nodes, above=None):
            for n in nodes:
                drawn.extend(n.files)
                pairs.append((above, n))
                walk(n.children, n)
        walk(family(self.root))
        assert sorted(f.path.parent/name for f in drawn for name in f.names) == sorted(self.paths())
        for above, n in pairs:
            before = [f for f in drawn if is_ancestor(f, n.files[0]) and (f.step, f.lineage) != (n.step, n.line)]
            assert (above.step if above else None) == max((f.step for f in before), default=None)
            if above: assert is_ancestor(above.files[0], n.files[0])

    def best_is_best(self, run):
        "After a session that ended well: no living file of this run's line has a lower loss than the best one."
        living = [c for c in RunDir(run).living() if c.path.name != ALIEN]
        mine = [c for c in living if c.path.name != AUTO and c.val_loss and c.lineage[-1]['run_id'] == living[0].lineage[-1]['run_id'] and is_ancestor(c, living[0])]
        if mine: assert describe(run/WORDS['best']).val_loss <= min(c.val_loss for c in mine)

    def histories_follow(self):
        "The history of each run is its lineage's own, each step once, and every checkpoint on that line remembers the same."
        for run in (self.root/f for f in FOLDERS if (self.root/f/'metrics.jsonl').exists()):
            h = load_history(run)
            steps = h.train['step'].tolist()
            assert steps == list(range(1, len(steps)+1))
            assert (np.diff(h.val['step']) > 0).all()
            for path in {*run.glob('[!.]*.pt')}-{run/ALIEN}:
                c = load_checkpoint(path)
                if c['lineage'] != h.lineage[:len(c['lineage'])] or c['global_step'] > len(steps): continue
                assert [r['loss'] for r in c['train_history']] == h.train['loss'][:c['global_step']].tolist()
                due = c['global_step']+(c['val_loss'] is not None)  # one that was saved in the middle of its evaluation lacks it
                assert [r['step'] for r in c['val_history']] == [s for s in h.val['step'] if s < due]


@pytest.fixture(scope='module')
def text(tmp_path_factory): return write_text(tmp_path_factory.mktemp('text')/'text.txt', lines=90)


def live(life, root, text):
    world = World(root, text)
    for deed in life:
        world.do(deed)
        world.histories_follow()
    shutil.rmtree(world.root)


@settings(max_examples=15, derandomize=True, deadline=None, database=None, phases=[Phase.explicit, Phase.generate],
          suppress_health_check=list(HealthCheck))
@given(life=lives)
def test_nothing_is_lost_and_all_is_true(text, tmp_path_factory, life): live(life, tmp_path_factory.mktemp('world'), text)


def delete_instead(monkeypatch): monkeypatch.setattr(RunDir, 'set_aside', lambda self, paths: [p.unlink() for p in paths if p.exists()] and None)
def forget_the_trunk(monkeypatch): monkeypatch.setattr(RunDir, 'keep_named', lambda self, *a: None)
def claim_another_step(monkeypatch): monkeypatch.setattr(Trainer, '_join', lambda t, line: setattr(t, 'lineage', [*line, dict(
    id=new_id(), parent=line[-1]['id'] if line else None, from_step=max(0, t.step-1), run_id='r')]))
def say_a_lower_loss(monkeypatch): monkeypatch.setattr(Engine, 'evaluate', lambda self, f=Engine.evaluate: f(self)-(self is not World.judge))


def hang_from_the_oldest(monkeypatch):
    monkeypatch.setattr(lmnb.runs, 'max', min, raising=False)


@contextmanager
def without(owner, name, instead):
    "Within the block another function in its place."
    kept = getattr(owner, name)
    setattr(owner, name, instead)
    try: yield
    finally: setattr(owner, name, kept)


PRUNE, SAVE = RunDir.prune, Writer.save


def prune_one_too_many(monkeypatch): monkeypatch.setattr(RunDir, 'prune', lambda self, n, now: PRUNE(self, n and n-1, now))


def prune_another_lineage_s(monkeypatch):
    def prune(self, n, now):
        with without(lmnb.rundir, 'is_ancestor', lambda a, b: True): return PRUNE(self, n, now)
    monkeypatch.setattr(RunDir, 'prune', prune)


def prune_what_is_set_aside(monkeypatch):
    def prune(self, n, now):
        if n: [p.unlink() for p in self.path.glob('superseded/*/*.pt') if describe(p).step <= now.step]
        return PRUNE(self, n, now)
    monkeypatch.setattr(RunDir, 'prune', prune)


def prune_the_trunk(monkeypatch):
    monkeypatch.setattr(RunDir, 'prune', lambda self, n, now: PRUNE(self, n, now)+[p.unlink() for p in [self/WORDS['trunk']] if n and p.exists()])


def prune_before_it_is_safe(monkeypatch):
    def save(self, state, names):
        run, keep = RunDir(self.folder), state['config'].keep_last
        if keep and (newest := run.living()): PRUNE(run, keep-1, newest[0])
        return SAVE(self, state, names)
    monkeypatch.setattr(Writer, 'save', save)


BRANCH_WITHOUT_BEST = (Deed('b', how='kill -9 in half a file', after=11), Deed('c', 0, 19, how='in an evaluation', after=1))
GO_BACK = (Deed('a'), Deed('', 1, 12), Deed('', 0, 30), Deed('', 2, 5, how='SIGTERM'))


def test_final_of_a_run_without_its_periodic_files(text, tmp_path):
    "The user deleted them to save space; the extension then needs the names of the rest."
    live((Deed('a'), Deed('', 0, how='rm'), Deed('', 0, how='rm'), Deed('', 0, how='rm'), Deed('', 1, 12)), tmp_path/'world', text)


KEEP_TWO = (Deed('b'), Deed('a', keep_last=2), Deed('', 0, 30, alien=True), Deed('', 1, 0, keep_last=3), Deed('', 0, 12, keep_last=2, how='disk full'))
OF_KEEPING = (prune_one_too_many, prune_another_lineage_s, prune_what_is_set_aside, prune_the_trunk, prune_before_it_is_safe)


def test_a_branch_stopped_in_its_first_evaluation(text, tmp_path): live(BRANCH_WITHOUT_BEST, tmp_path/'world', text)


@pytest.mark.parametrize('life, faults', [
    (GO_BACK, (delete_instead, forget_the_trunk, claim_another_step, say_a_lower_loss, hang_from_the_oldest)), (KEEP_TWO, OF_KEEPING)],
    ids=['of the folder', 'of keep_last'])
def test_a_fault_is_seen(text, tmp_path, monkeypatch, life, faults):
    live(life, tmp_path/'sound', text)
    for fault in faults:
        with monkeypatch.context() as m, pytest.raises(AssertionError):
            fault(m)
            live(life, tmp_path/fault.__name__, text)
