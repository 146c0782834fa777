"""What the panel costs and how fast it is, measured in a real kernel beside a real training:

    python bench/panel.py             prints a Markdown table; about six minutes on two quiet cores
"""
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jupyter_client.manager import start_new_kernel

LONG = 1_000_000  # logged steps of the synthetic run


def run_cell(kernel, code, timeout=300):
    "Run code in the kernel; what it printed, and the seconds it took."
    out, t0 = [], time.perf_counter()
    def heard(m):
        if m['msg_type'] == 'stream': out.append(m['content']['text'])
        if m['msg_type'] == 'error': raise RuntimeError('\n'.join(m['content']['traceback']))
    kernel.execute_interactive(code, output_hook=heard, timeout=timeout)
    return ''.join(out).strip(), time.perf_counter()-t0


def started(folder):
    "`small`, on all cores, in the background; waits for its first steps."
    p = subprocess.Popen([sys.executable, '-m', 'lmnb.cli', 'train', '--quiet', '--config', 'small', '--max-steps', '100000',
                          '--checkpoint-dir', folder/'small'], stdout=subprocess.DEVNULL)
    while steps(folder/'small') < 20: time.sleep(.2)
    return p


def steps(run):
    "The last step in the event file."
    try: lines = (run/'metrics.jsonl').read_bytes()[-4000:].splitlines()
    except FileNotFoundError: return 0
    return max([e['step'] for e in map(json.loads, lines[1:]) if e['kind'] == 'train'], default=0)


def rate(run, s):
    "Steps a second, by the times of the events."
    def last(): return [e for e in map(json.loads, (run/'metrics.jsonl').read_bytes()[-6000:].splitlines()[1:]) if e['kind'] == 'train'][-1]
    a = last()
    time.sleep(s)
    b = last()
    return (b['step']-a['step'])/(b['time']-a['time'])


OPEN = 'from lmnb import ResumePanel\npanel = ResumePanel({!r})\npanel'
WATCH = '''
import time
seen = dict(bar=[], plot=[])
for name in seen: getattr(panel, name).observe(lambda c, name=name: seen[name].append(time.time()), 'value')
'''
TOLD = '''
def gaps(ts): return [b-a for a,b in zip(ts, ts[1:])]
print([[len(ts)/(ts[-1]-ts[0]), max(gaps(ts))] for ts in seen.values()])
'''


def beside_a_training(folder, rounds=6, s=20):
    run, rows = folder/'small', []
    training = started(folder)
    manager, kernel = start_new_kernel()
    try:
        run_cell(kernel, 'import lmnb')  # a fresh kernel that has run nothing else
        _, attach = run_cell(kernel, OPEN.format(str(folder)))
        run_cell(kernel, WATCH)
        opened, closed = [], []
        for _ in range(rounds):
            opened.append(rate(run, s))
            run_cell(kernel, 'pause = panel.done; pause.set()')
            closed.append(rate(run, s))
            run_cell(kernel, 'pause.clear(); panel._watch(1.)')
        time.sleep(30)
        run_cell(kernel, 'for ts in seen.values(): ts.clear()')
        time.sleep(60)
        (bar, plot) = json.loads(run_cell(kernel, TOLD)[0])
    finally:
        manager.shutdown_kernel(now=True)
        training.terminate()
        training.wait()
    ratios = [a/b for a, b in zip(opened, closed)]
    rows.append(('numbers', f'{bar[0]:.2f} a second, longest gap {bar[1]:.1f} s', 'one a second'))
    rows.append(('picture', f'one in {1/plot[0]:.1f} s, longest gap {plot[1]:.1f} s', 'at least every 5 s'))
    rows.append((f'training speed, panel open / closed, {rounds} rounds of {s} s in one run',
                 f'{statistics.median(ratios):.3f} ({min(ratios):.3f}–{max(ratios):.3f})', 'at least 0.98'))
    rows.append(('cell run to live plot in a new kernel, while it trains', f'{attach:.2f} s', 'at most 2 s'))
    return rows


def line(**fields):
    return json.dumps(dict(schema=1, time=1.7e9, run_id='r', segment='s')|fields, separators=(',', ':'))+'\n'


def long_run(folder):
    "A run of a million logged steps, opened; and an hour's worth of looks at it while it grows."
    from lmnb.config import preset
    run = folder/'long'
    run.mkdir()
    lineage = [dict(id='s', parent=None, from_step=0, run_id='r')]
    with open(run/'metrics.jsonl', 'w') as f:
        f.write(line(kind='start', step=0, max_steps=2*LONG, lineage=lineage, config=vars(preset()), versions={}))
        for k in range(1, LONG+1):
            f.write(line(kind='train', step=k, loss=2+5/(1+k/1e4), lr=4e-3, grad_norm=.5, tokens=k*1024, tok_per_s=2400., dt_ms=400.))
            if k % 100 == 0: f.write(line(kind='val', step=k, loss=2.1+5/(1+k/1e4)))
    (run/'run.json').write_text(json.dumps(dict(state='stopped', step=LONG, max_steps=2*LONG)))
    manager, kernel = start_new_kernel()
    try:
        run_cell(kernel, 'from lmnb import ResumePanel; ResumePanel')
        _, opens = run_cell(kernel, OPEN.format(str(run)))
        size = int(run_cell(kernel, 'print(len(panel.plot.value))')[0])
        grow = f'''
import json, psutil
panel.done.set()
def mb(): return psutil.Process().memory_info().rss/2**20
def look(n, k):
    with open({str(run/"metrics.jsonl")!r}, 'a') as f:
        for i in range(n):
            f.write(json.dumps(dict(schema=1, kind='train', time=1.7e9, run_id='r', segment='s', step=k+i, loss=2., lr=4e-3, grad_norm=.5,
                                    tokens=1, tok_per_s=1., dt_ms=1.), separators=(',', ':'))+chr(10)); f.flush()
            if i%10==0: panel.draw_due = 0.
            panel._look()
look(200, {LONG+1}); first = mb(); look(3400, {LONG+201}); print(first, mb())
'''
        before, after = map(float, run_cell(kernel, grow, 1200)[0].split())
    finally: manager.shutdown_kernel(now=True)
    return [(f'a run of {LONG:,} logged steps ({(run/"metrics.jsonl").stat().st_size/1e6:.0f} MB) opens', f'{opens:.2f} s', 'at most 1.5 s'),
            ('its picture', f'{size/1e3:.0f} kB', 'at most 100 kB'),
            ("memory of the kernel over an hour's worth of updates", f'{before:.0f} → {after:.0f} MiB', 'flat')]


def many_runs(folder):
    "50 runs with 20 checkpoints each, listed by a process that has seen none of them."
    from lmnb import Trainer, preset
    (folder/'words.txt').write_text('a few words and more\n'*3000)
    c = preset('medium', data=str(folder/'words.txt'), vocab_size=300, block_size=16, n_embd=48, max_steps=21, save_interval=1,
               eval_interval=30, eval_batches=1, cooldown_frac=0)
    Trainer(c, folder/'many/r0', quiet=True).fit()
    for extra in ('best_model.pt', 'final_model.pt', 'checkpoint_step_1.pt'): (folder/'many/r0'/extra).unlink(missing_ok=True)
    for i in range(1, 50): shutil.copytree(folder/'many/r0', folder/f'many/r{i}')
    code = f'''import time
from lmnb.background import condition, find_runs
from lmnb.rundir import list_checkpoints
t = time.perf_counter(); runs = find_runs({str(folder/"many")!r}); [condition(r) for r in runs]; a = time.perf_counter()-t
t = time.perf_counter(); n = sum(len(list_checkpoints(r)) for r in runs); print(len(runs), n, a, time.perf_counter()-t)'''
    times = [subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split() for _ in range(5)]
    n, m = times[0][:2]
    a, b = (statistics.median(float(t[i]) for t in times) for i in (2, 3))
    return [(f'{n} runs listed', f'{a:.3f} s', 'at most 0.3 s'), (f'their {m} checkpoints read', f'{b:.2f} s', 'at most 1 s')]


if __name__ == '__main__':
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
    folder = Path(tempfile.mkdtemp())
    try: rows = [*many_runs(folder), *long_run(folder), *beside_a_training(folder)]
    finally: shutil.rmtree(folder)
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True).stdout.strip()
    print(f'Commit {commit}, {time.strftime("%d %B %Y")}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, '
          f'Python {platform.python_version()}\n\n| what | measured | target |\n|---|---|---|')
    for r in rows: print(f'| {" | ".join(r)} |')
