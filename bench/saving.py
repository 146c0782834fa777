"""What a save costs, at `medium`, beside nanoGPT's own:

    python bench/saving.py [NANOGPT]      a checkout of nanoGPT; about 25 minutes on two quiet cores

A run saves every 20th step, so that blocks of ten steps with a save and without one take turns: their ratio is what a
save every ten steps costs a whole run, whatever else the machine does. nanoGPT's model, optimizer and `torch.save` are
its own, in a loop of the same form. Peak memory is the process's; `saved` and `resumed` are runs of 20 steps more.
"""
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EVERY, STEPS = 20, 200  # steps between saves, and in a run
SHAPE = dict(n_layer=7, n_head=6, n_embd=384, block_size=256, vocab_size=8192)
BATCH = 4

OURS = '''
import re, sys
from pathlib import Path
from lmnb.cli import train
try: train(sys.argv[1:])
finally: print('PEAK', int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])/1024)
'''


def ours(folder, *args):
    "Train; events and peak memory in MiB."
    flags = ['--config', 'medium', '--eval-interval', '100000', '--checkpoint-dir', folder, '--set', 'cooldown_frac=0', 'save_minutes=0']
    out = subprocess.run([sys.executable, '-c', OURS, *map(str, flags), *args], check=True, capture_output=True, text=True).stdout
    events = [json.loads(l) for l in (Path(folder)/'metrics.jsonl').read_text().splitlines()]
    return events, float(re.search(r'PEAK (\S+)', out)[1])


def blocks(ends):
    "Seconds of each ten steps, by (step, seconds) at their ends: those that begin with a save, and those without one."
    took = {step: t-ends[step-10] for step, t in ends.items() if step-10 in ends and step > 20}
    return [took[s] for s in took if (s-10) % EVERY == 0], [took[s] for s in took if (s-10) % EVERY]


def lmnb(folder, optimizer):
    events, peak = ours(folder, f'optimizer={optimizer}', '--max-steps', str(STEPS), '--save-interval', str(EVERY))
    ends = {e['step']: e['time'] for e in events if e['kind'] == 'train' and e['step'] % 10 == 0}
    stalls = [e['stall_ms']/1e3 for e in events if e['kind'] == 'save' and e['step'] < STEPS]
    return *blocks(ends), stalls, peak, next(e['bytes'] for e in events if e['kind'] == 'save')


def nanogpt(checkout, steps=100):
    "The same of nanoGPT, in this process: its model, its optimizer, its dict of five keys, its `torch.save`."
    sys.path.insert(0, str(checkout))
    import torch
    from model import GPT, GPTConfig
    out = Path(tempfile.mkdtemp())/'ckpt.pt'
    args = dict(SHAPE, bias=False, dropout=0.)
    model = GPT(GPTConfig(**args))
    optimizer = model.configure_optimizers(.1, 1e-3, (.9, .95), 'cpu')
    ends, stalls = {}, []
    for k in range(1, steps+1):
        x = torch.randint(SHAPE['vocab_size'], (BATCH, SHAPE['block_size']))
        _, loss = model(x, x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if k % 10 == 0: ends[k] = time.time()
        if k % EVERY == 0:
            t0 = time.perf_counter()
            torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), model_args=args, iter_num=k,
                            best_val_loss=loss, config=args), out)
            stalls.append(time.perf_counter()-t0)
    peak = int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1])/1024
    print(json.dumps([*blocks(ends), stalls, peak, out.stat().st_size]))


def row(name, found):
    "Cost of a save in steps, of a save every ten steps in the whole run, and memory."
    saved, plain, stalls, peak, size = found
    step = statistics.median(plain)/10
    pairs = [a/b for a, b in zip(saved, plain)]
    def spread(xs, f): return f'{statistics.median(xs):{f}} ({min(xs):{f}}–{max(xs):{f}})'
    print(f'| {name} | {step:.2f} s | {spread([s/step for s in stalls], ".3f")} | {spread(pairs, ".3f")} '
          f'| {sum(saved)/sum(plain[:len(saved)]):.3f} | {size/2**20:.0f} MiB | {peak:.0f} MiB |', flush=True)


def main(checkout=None, rounds=2):
    import torch
    from lmnb.engine import device_name
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=Path(__file__).parent, capture_output=True, text=True).stdout
    print(f'Commit {commit.strip()}, {device_name("cpu")}, {os.cpu_count()} cores, torch {torch.__version__}.\n')
    print('| program | a step | waits for a save, in steps | ten steps with a save / without | all of them | file | peak memory |')
    print('|---|---|---|---|---|---|---|', flush=True)
    with tempfile.TemporaryDirectory() as d:
        for i in range(rounds):
            row('lmnb, muon', lmnb(f'{d}/muon{i}', 'muon'))
            row('lmnb, adamw', lmnb(f'{d}/adamw{i}', 'adamw'))
            if not checkout: continue
            out = subprocess.run([sys.executable, __file__, '--nanogpt', checkout], check=True, capture_output=True, text=True).stdout
            row('nanoGPT, no fsync', json.loads(out.splitlines()[-1]))
        peaks = [ours(f'{d}/{name}', '--max-steps', n, '--save-interval', every)[1]
                 for name, n, every in (('bare', '20', '20'), ('saved', '20', '5'))]
        resumed = ours(f'{d}/saved', '--resume', 'latest', '--extend-steps', '40')[1]
    print('\nPeak memory of 20 steps: {:.0f} MiB with a save at the end, {:.0f} with four; resumed for 20 more {:.0f}.'.format(*peaks, resumed))


if __name__ == '__main__':
    if sys.argv[1:2] == ['--nanogpt']: nanogpt(sys.argv[2])
    else: main(*sys.argv[1:])
