"""What extending costs in validation loss, `small` on the built-in corpus: half as long, then extended, against straight.

    python bench/extend.py [FOLDER [STEPS [SEED ...]]]   prints Markdown tables; about two hours on one core, less on two

STEPS are those of the longer run (600), the seeds 0, 1 and 2. With more than 600 only the climb in use is tried. Each training is kept in FOLDER (a temporary one if not given), and a second call goes on where the first one was stopped.
"""
import math
import sys
import tempfile
from pathlib import Path
from statistics import mean
from unittest.mock import patch

import torch

from lmnb import Trainer, load_checkpoint, preset
from lmnb import schedule as planning

N, SEEDS = 600, [0, 1, 2]
USED = f'line of {planning.CLIMB_STEPS}'
FORMS = {  # how the rate comes back: its share of the peak `k` steps after the seam, from a share `a`
    'at once': lambda k, a: 1.,
    'line of 10': lambda k, a: a+k/10,
    'line of 20': lambda k, a: a+k/20,
    'line of 50': lambda k, a: a+k/50,
    'line of 100': lambda k, a: a+k/100,
    'half a cosine of 100': lambda k, a: a+(1-a)*(1-math.cos(math.pi*min(1, k/100)))/2,
    'line of 50, to half the peak': lambda k, a: min(.5, a+k/50),
}


def climbing(form, schedule):
    "Within the block, climbs have this form, and go back to the plan of a straight run."
    straight = planning.Plan.lr
    def lr(self, k):
        s = self.begun(k)[-1]
        if k < 1 or s['kind'] != 'climb': return straight(self, k)
        c = self.config
        return min(planning.straight_lr(c, s['max_steps'], k, schedule), c.lr*FORMS[form](k-s['from_step'], s['lr']/c.lr))
    return patch.object(planning.Plan, 'lr', lr)


def done(folder, begin):
    "The final checkpoint of a training, from the disk if it is there."
    if not (folder/'final_model.pt').exists():
        t = Trainer.resume('latest', folder, quiet=True) if list(folder.glob('checkpoint_*.pt')) else begin(folder)
        t.fit()
    return load_checkpoint(folder/'final_model.pt')


def measure(root, seed, schedule):
    "Final validation losses, by what was done."
    def config(n): return preset('small', seed=seed, schedule=schedule, max_steps=n, eval_interval=N//10, eval_batches=32, save_interval=3*N//20)
    where = root/f'{schedule}-{seed}'
    straight, half = (done(where/f'{n}', lambda d, n=n: Trainer(config(n), d, quiet=True)) for n in (N, N//2))
    out = {f'straight {N}': straight['val_loss'], f'straight {N//2}': half['val_loss']}
    best = 'best' if load_checkpoint(where/f'{N//2}'/'best_model.pt')['global_step'] != N//2 else None
    for name in filter(None, ('final', best)):
        begin = lambda d: Trainer.resume(where/f'{N//2}'/f'{name}_model.pt', d, extend_steps=N, quiet=True)
        if schedule == 'cosine': out[f'from {name}, {USED}, constant, linear fall'] = done(where/f'{name} constant', begin)['val_loss']
        for form in [USED] if N > 600 else FORMS if schedule == 'wsd' else ('at once', 'line of 10', 'line of 20', 'line of 50'):
            with climbing(form, schedule): out[f'from {name}, {form}'] = done(where/f'{name} {form}', begin)['val_loss']
    if schedule == 'wsd':
        trunk = done(where/'trunk', lambda d: Trainer.resume(where/f'{N//2}'/'trunk_model.pt', d, extend_steps=N, quiet=True))
        same = all(torch.equal(a, trunk['model_state_dict'][k]) for k, a in straight['model_state_dict'].items())
        out['from trunk: ' + ('the straight run\'s bits' if same else 'OTHER BITS')] = trunk['val_loss']
    for step in (3*N//10, 9*N//20) if schedule == 'wsd' else (3*N//10,):
        early = lambda d: Trainer.resume(where/f'{N}'/f'checkpoint_step_{step}.pt', d, extend_steps=N//2, quiet=True)
        out[f'{N} shortened to {N//2} at {step}'] = done(where/f'early {step}', early)['val_loss']
    return out


def table(schedule, rows):
    "One row for what was done: a loss for each seed, and how far it is above the straight run of its length."
    lines = [f'| {schedule} | '+' | '.join(f'seed {s}' for s in SEEDS)+' | above straight: mean (least–most) |', '|---'*(len(SEEDS)+2)+'|']
    for what in dict.fromkeys(w for r in rows for w in r):
        got = [r.get(what) for r in rows]
        base = f'straight {N//2}' if 'shortened' in what else f'straight {N}'
        over = [100*(g/r[base]-1) for g, r in zip(got, rows) if g]
        above = '' if what.startswith('straight') else f'{mean(over):+.2f} % ({min(over):+.2f} to {max(over):+.2f})'
        lines.append(f'| {what} | '+' | '.join(f'{g:.4f}' if g else '–' for g in got)+f' | {above} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    root = Path(sys.argv[1] if sys.argv[1:] else tempfile.mkdtemp())
    if sys.argv[2:]: N = int(sys.argv[2])
    if sys.argv[3:]: SEEDS = list(map(int, sys.argv[3:]))
    for schedule in ('wsd', 'cosine'):
        print(table(schedule, [measure(root, s, schedule) for s in SEEDS])+'\n', flush=True)
