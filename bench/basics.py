"""Figures of the first release, each side by side with what it is compared to, in turn; a part of speed.py:

    python bench/basics.py            prints a Markdown table; about twelve minutes on two quiet cores

start-up (--help; spawn to first finished step), the loop against a plain one, memory while a large corpus is encoded.
"""
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
LMNB = [sys.executable, '-m', 'lmnb.cli', 'train']


def seconds(*command):
    t0 = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter()-t0


def first_step(folder):
    "Seconds from spawn to the first train event of `small`, data cached."
    t0 = time.perf_counter()
    p = subprocess.Popen([*LMNB, '--config', 'small', '--checkpoint-dir', folder], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = Path(folder)/'metrics.jsonl'
    while not (log.exists() and b'"kind":"train"' in log.read_bytes()):
        if p.poll() is not None: raise RuntimeError('the run ended before its first step')
        time.sleep(.01)
    dt = time.perf_counter()-t0
    p.terminate()
    p.wait()
    return dt


def trainer_rate(name, steps, folder):
    "Tokens a second of lmnb's own loop, by the clock of its events, the first tenth left out; without a trunk to save."
    subprocess.run([*LMNB, '--quiet', '--config', name, '--max-steps', str(steps), '--save-interval', '10000', '--eval-interval', '10000',
                    '--checkpoint-dir', folder, '--set', 'log_interval=5', 'cooldown_frac=0'], check=True, stdout=subprocess.DEVNULL)
    events = [json.loads(l) for l in (Path(folder)/'metrics.jsonl').read_text().splitlines()]
    train = {e['step']: e for e in events if e['kind'] == 'train'}
    a, b = train[max(5, steps//10//5*5)], train[steps]
    return (b['tokens']-a['tokens'])/(b['time']-a['time'])


PLAIN = '''
import sys, time, torch
from lmnb.config import preset
from lmnb.data import get_batch, load_corpus
from lmnb.model import GPT
from lmnb.optim import make_optimizers, set_lr
from lmnb.schedule import Plan
name, steps = sys.argv[1], int(sys.argv[2])
c = preset(name, max_steps=steps)
ids, plan = load_corpus(c).train, Plan.straight(c)
model = GPT(c); opts = make_optimizers(model, c)
first = max(5, steps//10//5*5)
for k in range(1, steps+1):
    set_lr(opts, plan.lr(k))
    x, y = get_batch(ids, k, c.batch_size, c.block_size, c.seed)
    loss = model(x, y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
    for o in opts: o.step()
    for o in opts: o.zero_grad()
    loss.item()
    if k == first: t0 = time.time()
print((steps-first)*c.batch_size*c.block_size/(time.time()-t0))
'''


def plain_rate(name, steps):
    "Tokens a second of a bare loop over the same model, optimizer and data."
    out = subprocess.run([sys.executable, '-c', PLAIN, name, str(steps)], check=True, capture_output=True, text=True).stdout
    return float(out.split()[-1])


ENCODE = r'''
import re, sys, time
from pathlib import Path
from lmnb.data import documents, find_files, fingerprint, token_file
files, _ = find_files(sys.argv[1])
t0 = time.time()
contents, size = fingerprint(documents(files))
ids = token_file(Path(sys.argv[3]), contents, Path(sys.argv[2]).read_text(), lambda: documents(files))
print(size/1e6, len(ids), time.time()-t0, int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1])/1024)
'''


def encoding(folder, megabytes):
    "MB, ids, seconds and peak MiB of encoding the standard library's text, repeated to so many megabytes."
    from lmnb.config import preset
    from lmnb.data import documents, load_corpus, stdlib_files
    folder = Path(folder)
    (folder/'tok.json').write_text(load_corpus(preset('small')).tokenizer)
    text = ''.join(p or '\n' for p in documents(stdlib_files()))
    with open(folder/'text.txt', 'w', encoding='utf-8') as f:
        while f.tell() < megabytes*1e6: f.write(text[:int(megabytes*1e6-f.tell())+1])
    out = subprocess.run([sys.executable, '-c', ENCODE, folder/'text.txt', folder/'tok.json', folder/'cache'], check=True, capture_output=True, text=True)
    return [float(x) for x in out.stdout.split()]


def spread(xs, digits=2): return f'{statistics.median(xs):,.{digits}f} ({min(xs):,.{digits}f}–{max(xs):,.{digits}f})'


def row(what, ours, theirs, unit, digits=2):
    ratios = [a/b for a, b in zip(ours, theirs)]
    print(f'| {what} | {spread(ours, digits)} {unit} | {spread(theirs, digits)} {unit} | {spread(ratios)} |', flush=True)


def main(rounds=5):
    print('| what | lmnb | compared to | ratio |\n|---|---|---|---|')
    with tempfile.TemporaryDirectory() as d:
        bare = [seconds(sys.executable, '-c', 'import torch') for _ in range(rounds+1)][1:]
        row('`lmnb-train --help` / `import torch`', [seconds(*LMNB, '--help') for _ in range(rounds)], bare, 's')
        first_step(f'{d}/warm')
        pairs = [(first_step(f'{d}/first{i}'), seconds(sys.executable, '-c', 'import torch')) for i in range(rounds)]
        row('spawn to first finished step of `small`, data cached / `import torch`', *zip(*pairs), 's')
        for name, steps, n in (('small', 200, rounds), ('medium', 30, min(3, rounds))):
            pairs = [(trainer_rate(name, steps, f'{d}/{name}{i}'), plain_rate(name, steps)) for i in range(n)]
            row(f'training, `{name}`, {steps} steps / a plain loop', *zip(*pairs), 'tokens/s', 0)
    print('\n| corpus encoded | ids | seconds | peak memory |\n|---|---|---|---|')
    for megabytes in (30, 300):
        with tempfile.TemporaryDirectory() as d:
            mb, ids, s, peak = encoding(d, megabytes)
            print(f'| {mb:,.0f} MB | {ids:,.0f} | {s:.0f} | {peak:.0f} MiB |', flush=True)


if __name__ == '__main__': main()
