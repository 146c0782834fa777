"""One process against two and four, with DDP and FSDP: losses over 200 steps, and what a save costs; prints the tables of many.md:

    python bench/many.py [FOLDER]     half an hour on two cores

All on one machine, by gloo: more processes than cores are slower, so no speed is shown. A save is that of `medium`: how long the loop
waits for it, and how far each process' memory rises above what it had (VmHWM of proc(5), set back before each save).
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


def child(what, folder, *args):
    args = [None if a == 'None' else a for a in args]
    out = (losses if what == 'losses' else saves)(folder, *args)
    if os.environ.get('RANK', '0') == '0': print(json.dumps(out))


def run(n, *args):
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={n}'] if n > 1 else []
    p = subprocess.run([sys.executable, *torchrun, __file__, 'child', *map(str, args)], env=dict(os.environ, OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE'),
                       capture_output=True, text=True)
    if p.returncode: raise RuntimeError(p.stderr[-3000:])
    return json.loads(p.stdout.strip().splitlines()[-1])


def main(folder=None):
    folder = Path(folder or tempfile.mkdtemp())
    print('In two micro-batches one process, too, adds in another order: that is what rounding alone does here.\n')
    print('| optimizer | processes | largest difference of a step\'s loss, steps 1 to 10 | 11 to 50 | 51 to 200 | at step 200 | validation loss |\n|---|---|---|---|---|---|---|')
    for optimizer in ('adamw', 'muon'):
        for name, n, parallel in MODES:
            found = run(n, 'losses', folder/f'losses-{optimizer}-{name}{n}', optimizer, parallel)
            if name == 'one': one = found
            far = [abs(a-b) for a, b in zip(one, found)]
            print(f'| {optimizer} | {label(name, n)} | {max(far[:10]):.0e} | {max(far[10:50]):.0e} | {max(far[50:200]):.0e} | {far[199]:.0e} | {found[-1]:.4f} |', flush=True)
    print('\n| processes | the loop waits, ms | memory rises in the first, MiB | in the others | a process holds, MiB |\n|---|---|---|---|---|')
    for name, n, parallel in (m for m in MODES if m[0] != 'halves'):
        wait, rise, holds = run(n, 'saves', folder/f'saves-{name}{n}', parallel)
        others = f'{min(rise[1:]):.0f} to {max(rise[1:]):.0f}' if n > 1 else '–'
        print(f'| {label(name, n)} | {wait[0]:.0f} | {rise[0]:.0f} | {others} | {min(holds):.0f} to {max(holds):.0f} |', flush=True)


if __name__ == '__main__': child(*sys.argv[2:]) if sys.argv[1:2] == ['child'] else main(*sys.argv[1:])
