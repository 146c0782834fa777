"""One process against two and four, with DDP and FSDP; prints the tables of many.md:

    python bench/many.py [FOLDER [PART...]]     half an hour on two cores; parts: losses saves memory steps

All on one machine, by gloo. A save is that of `medium`: how long the loop waits for it, and how far each process' memory rises above
what it had (VmHWM of proc(5), set back before each save). A step's time is that of computing, as one process alone has it with the
same rows, times the processes that share a core, plus that of sending: bytes as the system counts them by what an all-reduce reaches.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODES = ('one', 1, None), ('halves', 1, None), ('DDP', 2, 'ddp'), ('FSDP', 2, 'fsdp'), ('DDP', 4, 'ddp'), ('FSDP', 4, 'fsdp')


def label(name, n): return {'one': '1', 'halves': '1, in two micro-batches'}.get(name, f'{n}, {name}')


def kib(field): return int(next(line for line in open('/proc/self/status') if line.startswith(field)).split()[1])


def losses(folder, optimizer, parallel):
    from lmnb import Trainer, preset
    config = preset('small', batch_size=4, micro_batch_size=2*('halves' in folder), max_steps=200, optimizer=optimizer, lr=3e-3 if optimizer == 'muon' else 1e-3, eval_interval=200, log_interval=1,
                    save_interval=10**6, save_minutes=0)
    t = Trainer.resume('latest-or-new', folder, config=config, quiet=True, parallel=parallel).fit()  # what is there is not trained again
    return [r['loss'] for r in t.train_history]+[t.val_loss]


def saves(folder, parallel, n=5):
    from lmnb import Trainer, preset
    t = Trainer(preset('medium', max_steps=n, save_interval=1, eval_interval=10**6, save_minutes=0, warmup_steps=0, cooldown_frac=0), folder, quiet=True, parallel=parallel)
    inner, took, rise = t._save, [], []
    def measured(names):
        t.writer.wait()                                 # the save alone, not the one before it
        Path('/proc/self/clear_refs').write_text('5')
        before, t0 = kib('VmRSS'), time.perf_counter()
        inner(names)
        took.append((time.perf_counter()-t0)*1e3)
        t.writer.wait()
        rise.append((kib('VmHWM')-before)/1024)
    t._save = measured
    t.fit()
    ranks = t.world.exchange((statistics.median(took[1:]), max(rise), kib('VmRSS')/1024))
    return [list(x) for x in zip(*ranks)]


def memory(folder, name, parallel):
    from lmnb import Trainer, preset
    from lmnb.model import memory_needed
    before = kib('VmRSS')
    config = preset(name, batch_size=max(4, preset(name).batch_size), max_steps=4, save_interval=2, eval_interval=4, eval_batches=1, warmup_steps=0)
    t = Trainer(config, folder, quiet=True, parallel=parallel).fit()
    took = t.world.exchange((kib('VmHWM')-before)/1024)
    return memory_needed(t.config, 'cpu', t.world.size, t.world.fsdp)/2**20, took


def steps(folder, name, batch_size, parallel, n=8):
    "Seconds a step, bytes sent in it, and bytes a second of an all-reduce (as each process sends them)."
    import psutil
    import torch
    import torch.distributed as dist
    from lmnb import Trainer, preset
    t = Trainer(preset(name, batch_size=int(batch_size)), folder, quiet=True, parallel=parallel)
    t.engine.train_step(1, 1e-3); t.engine.train_step(2, 1e-3)
    def sent(): return psutil.Process().io_counters().write_chars
    took, before = [], sent()
    for k in range(3, 3+n):
        t0 = time.perf_counter()
        t.engine.train_step(k, 1e-3)
        took.append(time.perf_counter()-t0)
    each, rate = (sent()-before)/n, None
    if t.world.size > 1:
        x, speeds = torch.zeros(8_000_000), []
        for _ in range(6):
            before, t0 = sent(), time.perf_counter()
            dist.all_reduce(x)
            speeds.append((sent()-before)/(time.perf_counter()-t0))
        rate = statistics.median(speeds)
    return [statistics.median(took), each, rate]


def child(what, folder, *args):
    args = [None if a == 'None' else a for a in args]
    out = dict(losses=losses, saves=saves, memory=memory, steps=steps)[what](folder, *args)
    if os.environ.get('RANK', '0') == '0': print(json.dumps(out))


def run(n, *args):
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={n}'] if n > 1 else []
    p = subprocess.run([sys.executable, *torchrun, __file__, 'child', *map(str, args)], env=dict(os.environ, OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE'),
                       capture_output=True, text=True)
    if p.returncode: raise RuntimeError(p.stderr[-3000:])
    return json.loads(p.stdout.strip().splitlines()[-1])


def print_losses(folder):
    print('In two micro-batches one process, too, adds in another order: that is what rounding alone does here.\n')
    print('| optimizer | processes | largest difference of a step\'s loss, steps 1 to 10 | 11 to 50 | 51 to 200 | at step 200 | validation loss |\n|---|---|---|---|---|---|---|')
    for optimizer in ('adamw', 'muon'):
        for name, n, parallel in MODES:
            found = run(n, 'losses', folder/f'losses-{optimizer}-{name}{n}', optimizer, parallel)
            if name == 'one': one = found
            far = [abs(a-b) for a, b in zip(one, found)]
            print(f'| {optimizer} | {label(name, n)} | {max(far[:10]):.0e} | {max(far[10:50]):.0e} | {max(far[50:200]):.0e} | {far[199]:.0e} | {found[-1]:.4f} |', flush=True)


def print_saves(folder):
    print('\n| processes | the loop waits, ms | memory rises in the first, MiB | in the others | a process holds, MiB |\n|---|---|---|---|---|')
    for name, n, parallel in (m for m in MODES if m[0] != 'halves'):
        wait, rise, holds = run(n, 'saves', folder/f'saves-{name}{n}', parallel)
        others = f'{min(rise[1:]):.0f} to {max(rise[1:]):.0f}' if n > 1 else '–'
        print(f'| {label(name, n)} | {wait[0]:.0f} | {rise[0]:.0f} | {others} | {min(holds):.0f} to {max(holds):.0f} |', flush=True)


def print_memory(folder):
    print('\n| preset | processes | estimated, the first, MiB | measured, the first | the others |\n|---|---|---|---|---|')
    for preset in ('small', 'medium', 'large'):
        for name, n, parallel in (m for m in MODES if m[0] != 'halves'):
            told, took = run(n, 'memory', folder/f'memory-{preset}-{name}{n}', preset, parallel)
            others = f'{min(took[1:]):.0f} to {max(took[1:]):.0f}' if n > 1 else '–'
            print(f'| {preset} | {label(name, n)} | {told:.0f} | {took[0]:.0f} | {others} |', flush=True)


def print_steps(folder, preset='medium', B=4):
    print('\n| processes | computing, ms | sent, MB | an all-reduce reaches, MB/s | expected, ms | measured, ms |\n|---|---|---|---|---|---|')
    for name, n, parallel in (m for m in MODES if m[0] != 'halves'):
        alone = run(1, 'steps', folder/f'alone{B//n}', preset, B//n, None)[0]*max(1, n/os.cpu_count())
        took, sent, rate = run(n, 'steps', folder/f'steps-{name}{n}', preset, B, parallel)
        expected = alone+(sent/rate if n > 1 else 0)
        print(f'| {label(name, n)} | {alone*1e3:.0f} | {sent/1e6*(n > 1):.0f} | {(rate or 0)/1e6:.0f} | {expected*1e3:.0f} | {took*1e3:.0f} |', flush=True)


PARTS = dict(losses=print_losses, saves=print_saves, memory=print_memory, steps=print_steps)


def main(folder=None, *parts):
    folder = Path(folder or tempfile.mkdtemp())
    for part in parts or PARTS: PARTS[part](folder)


if __name__ == '__main__': child(*sys.argv[2:]) if sys.argv[1:2] == ['child'] else main(*sys.argv[1:])
