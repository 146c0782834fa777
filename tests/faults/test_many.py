"Many processes: signals to one or all, kills, hangs, fewer processes after a loss; and what cannot train together says so once."
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from conftest import TORCHRUN, events, write_text

from lmnb import Trainer, load_checkpoint, preset
from lmnb.check import differences
from lmnb.rundir import RunDir

SETS = ('vocab_size=300 n_layer=1 n_embd=16 n_head=2 block_size=32 batch_size=4 eval_batches=2 dropout=0.1 log_interval=1 '
        'save_interval=20 eval_interval=20').split()


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


class Many:
    "A run of several processes, from outside."
    def __init__(self, cwd, *words, steps=60, n=2, torchrun=('--standalone',), log='out.txt', **env):
        self.run, self.log, self.began = cwd/'checkpoints', cwd/log, time.time()
        words = ['--config', 'small', '--data', 'corpus.txt', '--max-steps', str(steps), '--set', *SETS, *words]
        with open(self.log, 'w') as f:
            self.agent = subprocess.Popen([*TORCHRUN, *torchrun, f'--nproc-per-node={n}', '-m', 'lmnb.cli', 'train', *words], cwd=cwd, stdout=f,
                                          stderr=f, env=dict(os.environ, **env), start_new_session=True)

    def trained(self): return [e['step'] for e in events(self.run, 'train')] if (self.run/'metrics.jsonl').exists() else []

    def at(self, step):
        "Wait until `step` is done."
        while step not in self.trained():
            assert self.agent.poll() is None and time.time()-self.began < 120, self.log.read_text()
            time.sleep(.02)
        return self

    def processes(self):
        found = [p for p in psutil.Process(self.agent.pid).children(recursive=True) if 'lmnb.cli' in p.cmdline()]
        return sorted(found, key=lambda p: int(p.environ()['RANK']))

    def text(self):
        self.agent.wait(120)
        return self.log.read_text()

    def end(self):
        "What was printed, but for torchrun's own words."
        return [line for line in self.text().splitlines() if line.startswith(('lmnb-train:', 'Process', 'Stopped', 'Finished', 'Warning'))]


@pytest.fixture
def here(tmp_path):
    write_text(tmp_path/'corpus.txt')
    return tmp_path


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    "What a run that nobody stopped ends in."
    cwd = tmp_path_factory.mktemp('straight')
    write_text(cwd/'corpus.txt')
    m = Many(cwd, *SLOW)
    assert 'Finished at step 60' in m.end()[0]
    return load_checkpoint(m.run/'final_model.pt')


SLOW = '--set', 'save_minutes=0', 'n_layer=3', 'n_embd=64'  # some 10 ms a step


@pytest.mark.parametrize('whom', ['the first', 'the second', 'torchrun'])
def test_sigterm(here, straight, row, whom):
    row('many processes: SIGTERM to one, or to torchrun', 'all end after the same step, saved once; the end is the straight run\'s bits')
    m = Many(here, '--resume', 'latest-or-new', *SLOW).at(8)
    target = m.agent if whom == 'torchrun' else m.processes()[whom == 'the second']
    target.send_signal(signal.SIGTERM)
    said = m.end()
    assert len(said) == 1 and said[0].startswith('Stopped at step') and 'SIGTERM' in said[0], m.log.read_text()
    stopped = m.trained()[-1]
    assert stopped < 60 and load_checkpoint(m.run/'checkpoint_auto.pt')['global_step'] == stopped
    assert 'exact.' in Many(here, '--resume', 'latest-or-new', *SLOW).text()
    row.tried()
    assert differences(straight, load_checkpoint(m.run/'final_model.pt'), ('lineage', 'software')) == []


@pytest.mark.parametrize('whom', ['the first', 'the second', 'all'])
def test_kill(here, row, whom):
    row('many processes: kill -9 of one, or of all', 'no process is left; who lives says how far each came; the next start goes on from the latest file')
    m = Many(here, '--resume', 'latest-or-new', *SLOW).at(25)
    left = m.processes()
    for p in left if whom == 'all' else [left[whom == 'the second']]: p.kill()
    said = m.end()
    if whom != 'all': assert len(said) == 1 and 'lost each other' in said[0] and 'process 0 at step' in said[0] and '(silent)' in said[0], said
    psutil.wait_procs(left, 20)
    assert not any(p.is_running() and p.status() != 'zombie' for p in left)
    row.tried()
    assert RunDir(m.run).latest().step == 20
    again = Many(here, '--resume', 'latest-or-new', *SLOW)
    assert 'Finished at step 60' in again.end()[0] and events(m.run, 'resume')[0]['step'] == 20 and events(m.run, 'resume')[0]['exact']


def test_hang(here, row):
    row('many processes: one stops answering', 'after the time-out the run ends, and says how far each process came and which is silent')
    m = Many(here, *SLOW, steps=100_000, LMNB_TIMEOUT_S='5').at(25)
    m.processes()[1].suspend()
    while 'lost each other' not in m.log.read_text():
        assert time.time()-m.began < 300, m.log.read_text()
        time.sleep(.1)
    m.processes()[-1].kill()  # torchrun would wait half a minute for it
    said, = m.end()
    row.tried()
    assert 'process 1 at step' in said and said.endswith('(silent)') and 'Timed out' in said


LAST = """
import os, signal
from lmnb.parallel import join
world = join()
world.step = 7
world.exchange('both are here')
world.over.wait(2)  # for a sign of life
if world.rank: os.kill(os.getpid(), signal.SIGSTOP)
try: world.exchange('at the end')
except RuntimeError as e: print(e, flush=True)
os._exit(1)
"""


def test_a_hang_outside_of_a_step(here, row):
    row('many processes: one stops answering', 'after the time-out the run ends, and says how far each process came and which is silent')
    (here/'last.py').write_text(LAST)
    with open(here/'out.txt', 'w') as f:
        agent = subprocess.Popen([*TORCHRUN, '--standalone', '--nproc-per-node=2', 'last.py'], cwd=here, stdout=f, stderr=f,
                                 env=dict(os.environ, LMNB_TIMEOUT_S='5'))
    while 'does not answer' not in (text := (here/'out.txt').read_text()):
        assert agent.poll() is None, text
        time.sleep(.1)
    for p in psutil.Process(agent.pid).children(): p.kill()  # torchrun would wait half a minute for it
    agent.wait(60)
    row.tried()
    assert 'process 1 of 2 does not answer; process 0 at step 7, process 1 at step 7 (silent)' in (here/'out.txt').read_text()


def test_fewer_after_a_loss(here, row):
    row('many processes: a machine is lost under an elastic torchrun', 'the run goes on with fewer processes, from the latest checkpoint, by itself')
    elastic = ['--nnodes=1:2', '--max-restarts=2', '--rdzv-backend=c10d', f'--rdzv-endpoint=127.0.0.1:{free_port()}', '--local-addr=127.0.0.1', '--rdzv-id=x',
               '--monitor-interval=0.2']
    meeting = '--rdzv-conf=last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3,is_host='  # the one that stays keeps the list
    def start(host, **more): return Many(here, '--resume', 'latest-or-new', *SLOW, steps=400, n=1, torchrun=[*elastic, f'{meeting}{host}'], **more)
    one, other = start(1), start(0, log='other.txt')
    one.at(25)
    assert events(one.run, 'start')[0]['versions']['processes'] == '2 (ddp)'
    for p in (*other.processes(), psutil.Process(other.agent.pid)): p.kill()
    said = one.end()
    row.tried()
    assert 'Finished at step 400' in said[-1], one.log.read_text()
    back = events(one.run, 'resume')[0]
    assert back['step'] >= 20 and back['versions']['processes'] == '1' and not back['exact']


BAD = {  # what each process does differently: `$RANK` is its number
    'batch': ('exec {train} --set batch_size=3', 'lmnb-train: batch_size=3 cannot be shared by 2 processes: take a batch_size that is a multiple of 2, or 1 processes'),
    'config': ('exec {train} --seed $RANK', 'lmnb-train: the processes differ: seed is 0 in the first and 1 in process 1'),
    'data': ('cp corpus.txt mine$RANK.txt; echo $RANK >> mine$RANK.txt; exec {train} --data mine$RANK.txt', 'lmnb-train: the processes differ: data is'),
    'one has no data': ('if [ $RANK = 1 ]; then cd ..; fi; exec {train}', 'lmnb-train: process 1 of 2: data not found: corpus.txt'),
    'version': ('if [ $RANK = 1 ]; then exec {other}; fi; exec {train}', "lmnb-train: the processes differ: lmnb is '"),
    'an argument': ('exec {train} --max-stepz 3', 'lmnb-train: unknown argument --max-stepz; did you mean --max-steps?'),
    'no such file': ('exec {train} --resume 500', 'lmnb-train: Checkpoint not found: 500; there are none in checkpoints'),
}


@pytest.mark.parametrize('fault', BAD)
def test_said_once(here, fault):
    act, says = BAD[fault]
    flags = f'--config small --data corpus.txt --set {" ".join(SETS)}'
    other = 'import lmnb.engine; lmnb.engine.__version__ = "9.9"; from lmnb.cli import train; train()'
    script = act.format(train=f'{sys.executable} -m lmnb.cli train {flags}', other=f"{sys.executable} -c '{other}' {flags}")
    if '--data mine' in act: script = script.replace('--data corpus.txt ', '')
    p = subprocess.run([*TORCHRUN, '--standalone', '--nproc-per-node=2', '--no-python', 'bash', '-c', script], cwd=here, capture_output=True, text=True)
    said = [line for line in (p.stdout+p.stderr).splitlines() if 'lmnb-train' in line or line.startswith('[rank')]
    assert p.returncode and len(said) == 1 and said[0].startswith(says), p.stdout+p.stderr
    assert not (here/'checkpoints').exists()


def test_alone(here):
    env = dict(os.environ, WORLD_SIZE='2', RANK='0', LOCAL_RANK='0')
    def said(*words, **more):
        p = subprocess.run([sys.executable, '-m', 'lmnb.cli', 'train', *words], cwd=here, env=env | more, capture_output=True, text=True)
        assert p.returncode == 2 and p.stderr.count('\n') == 1
        return p.stderr
    assert 'MASTER_ADDR' in said() and 'torchrun' in said()
    assert '1/2 clients joined' in said(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()), LMNB_TIMEOUT_S='3')
    assert 'fsdp shares a model among processes, and this is one' in said('--parallel', 'fsdp', WORLD_SIZE='1')
    with pytest.raises(ValueError, match='ddp or fsdp'): Trainer(preset('small'), here/'checkpoints', parallel='dp')
