"Whatever is done to a folder of runs: no finished checkpoint is lost, each says truly where it came from, and so do the plots."
import hashlib
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
from conftest import write_text
from exact import TINY, forked, train
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import lmnb.runs
from lmnb import Trainer, load_checkpoint, load_history, preset
from lmnb.checkpoint import describe
from lmnb.engine import Engine
from lmnb.rundir import AUTO, WORDS, RunDir, is_ancestor
from lmnb.runs import family
from lmnb.trainer import new_id

KINDS = ('SIGTERM', 'kill -9 in a step', 'kill -9 in half a file', 'kill -9 between two names', 'in an evaluation', 'disk full')
FOLDERS = ('a', 'b', 'c')


@dataclass(frozen=True)
class Deed:
    "One command: a new run (`file` None) or a resume of the file of that number, and how it ends (`rm`: the user deletes that file)."
    folder: str           # of a new run or a branch; '' for a resume where the file lies
    file: int = None
    total: int = 0        # steps more, or fewer, than the file's plan has
    new_run: bool = False
    how: str = None
    after: int = 5


resumes = st.builds(Deed, st.sampled_from(('', '', '', *FOLDERS)), st.integers(0, 99), st.integers(-12, 20), how=st.sampled_from((None, *KINDS)),
                    after=st.integers(1, 12))
starts = st.builds(Deed, st.sampled_from(FOLDERS), new_run=st.booleans(), how=st.sampled_from((None, *KINDS)), after=st.integers(1, 20))
deletions = st.builds(Deed, st.just(''), st.integers(0, 99), how=st.just('rm'))
lives = st.lists(st.one_of(resumes, resumes, resumes, starts, deletions), min_size=3, max_size=9)


class World:
    "A folder of runs, and what is known of every checkpoint that was ever finished in it."
    def __init__(self, root, text):
        self.root, self.files = root, {}
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
            del self.files[path]
            return 'deleted'
        def prepare(**kw):
            if path is None: return Trainer(self.config, self.root/deed.folder, new_run=deed.new_run, **kw)
            total = describe(path).max_steps+deed.total
            return Trainer.resume(path, self.root/deed.folder if deed.folder else None, extend_steps=total if deed.total else None, **kw)
        def act():
            try: return train(prepare, self.root/'batches.txt', deed.how, deed.after)
            except (ValueError, FileNotFoundError) as e: print(f'refused: {e}'); return 2
        before = self.files
        came_from = load_checkpoint(path, note=lambda _: None) if path else None
        code = forked(act, self.root/'said.txt')
        assert code in (0, 1, 2, 3, -9), (self.root/'said.txt').read_text()
        self.files = {p: self.known(p) for p in self.paths()}
        if code == 2: assert self.files == before
        self.nothing_is_lost(before)
        self.all_is_true(before, came_from)
        if code in (0, 3) and deed.folder: self.best_is_best(self.root/deed.folder)
        return code

    def known(self, path):
        "What tells one checkpoint from another: its bytes; its step and weights; whether its loss is known."
        state = load_checkpoint(path, note=lambda _: None)  # every byte is checked
        weights = hashlib.sha256(b''.join(t.numpy().tobytes() for t in state['model_state_dict'].values())).hexdigest()
        return hashlib.sha256(path.read_bytes()).hexdigest(), (state['global_step'], weights), state['val_loss']

    def nothing_is_lost(self, before):
        here, states = ({f[i] for f in self.files.values()} for i in (0, 1))
        for bytes_, state, val_loss in before.values():
            names = {p.name for p, f in before.items() if f[0] == bytes_}
            if bytes_ in here or names <= {AUTO, WORDS['best']}: continue
            assert val_loss is None and state in states, f'{names} is gone'  # written again once it was evaluated

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
        living = [c for c in RunDir(run).living() if c.path.name != AUTO]
        mine = [c for c in living if c.val_loss and c.lineage[-1]['run_id'] == living[0].lineage[-1]['run_id'] and is_ancestor(c, living[0])]
        if mine: assert describe(run/WORDS['best']).val_loss <= min(c.val_loss for c in mine)

    def histories_follow(self):
        "The history of each run is its lineage's own, each step once, and every checkpoint on that line remembers the same."
        for run in (self.root/f for f in FOLDERS if (self.root/f/'metrics.jsonl').exists()):
            h = load_history(run)
            steps = h.train['step'].tolist()
            assert steps == list(range(1, len(steps)+1))
            assert (np.diff(h.val['step']) > 0).all()
            for path in run.glob('[!.]*.pt'):
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


GO_BACK = (Deed('a'), Deed('', 1, 12), Deed('', 0, 30), Deed('', 2, 5, how='SIGTERM'))


def test_final_of_a_run_without_its_periodic_files(text, tmp_path):
    "The user deleted them to save space; the extension then needs the names of the rest."
    live((Deed('a'), Deed('', 0, how='rm'), Deed('', 0, how='rm'), Deed('', 0, how='rm'), Deed('', 1, 12)), tmp_path/'world', text)


@pytest.mark.parametrize('fault', [delete_instead, forget_the_trunk, claim_another_step, say_a_lower_loss, hang_from_the_oldest])
def test_a_fault_is_seen(text, tmp_path, monkeypatch, fault):
    live(GO_BACK, tmp_path/'sound', text)
    fault(monkeypatch)
    with pytest.raises(AssertionError): live(GO_BACK, tmp_path/'faulty', text)
