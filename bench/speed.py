"""lmnb beside nanoGPT, HF Trainer and Lightning, in turn, in one run; prints the tables of RESULTS.md:

    python bench/speed.py NANOGPT [FOLDER] [PART ...]     a checkout of nanoGPT; two hours on two quiet cores

FOLDER (a temporary one if not given) keeps the peers' environment, the data and every training, so that a second call
goes on where the first was stopped. Parts: steps, share, memory, start, encode, far, basics, loss, long; all of them by default.

Every program trains on the same ids and is judged on the same 64 windows. A peer has its own script or its own `fit`,
with its own best documented flags; what is not even is said above each table.
"""
import json
import os
import pickle
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
SHAPES = dict(small=dict(n_layer=5, n_head=4, n_embd=128, batch_size=2), medium=dict(n_layer=7, n_head=6, n_embd=384, batch_size=4))
NG_STEPS = dict(small=1200, medium=600)
OURS_STEPS = dict(small=250, medium=150)
RATES = '3e-4', '1e-3', '3e-3'
NG_SEEDS = 1, 2                                         # beside 1337, which tries the rates; five minutes each at `medium`
LMNB = [sys.executable, '-m', 'lmnb.cli', 'train']


def spread(xs, f='.2f'): return f'{statistics.median(xs):,{f}} ({min(xs):,{f}}–{max(xs):,{f}})'


def run(*command, cwd=None, env=None):
    "A program's words; its last ones in an error."
    with subprocess.Popen([str(c) for c in command], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        try: p.stdout_text, p.stderr_text = p.communicate()
        except BaseException: p.kill(); raise           # no orphan beside the next measurement
    if p.returncode: raise RuntimeError(f'{str(command):.300}\n{p.stdout_text[-1500:]}\n{p.stderr_text[-3000:]}')
    return p.stdout_text


def last(text): return json.loads(text.strip().splitlines()[-1])


def child(python, code, *args): return last(run(python, '-c', code, *args))


class Kept:
    "Results by name, in a file: a bench that was stopped does not begin anew."
    def __init__(self, path): self.path, self.all = path, json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, name, make):
        if name not in self.all:
            self.all[name] = make()
            self.path.write_text(json.dumps(self.all))
        return self.all[name]


# The same ids for all

def prepare(checkout):
    "nanoGPT's data folder, with lmnb's ids of the built-in text."
    from lmnb.config import preset
    from lmnb.data import load_corpus
    corpus = load_corpus(preset('small'))
    out = checkout/'data'/'lmnb_bench'
    out.mkdir(parents=True, exist_ok=True)
    for name, ids in (('train', corpus.train), ('val', corpus.val)): ids[:].astype('<u2').tofile(out/f'{name}.bin')
    (out/'meta.pkl').write_bytes(pickle.dumps(dict(vocab_size=8192)))
    return len(corpus.train), len(corpus.val)


def peers(folder):
    "The Python of an environment with torch, transformers and Lightning, made once."
    python = folder/'peers'/'bin'/'python'
    if not python.exists():
        run(sys.executable, '-m', 'venv', folder/'peers')
        run(python, '-m', 'pip', 'install', '-q', '-c', HERE.parent/'constraints.txt', 'torch', 'numpy', 'transformers', 'accelerate', 'lightning')
    return python


# Losses

JUDGE = '''
import json, sys, torch
sys.path.insert(0, sys.argv[1])
from model import GPT, GPTConfig
from lmnb.config import preset
from lmnb.data import load_corpus, val_batches
saved = torch.load(sys.argv[2], weights_only=False)
model = GPT(GPTConfig(**saved['model_args'])); model.load_state_dict(saved['model']); model.eval()
total = n = 0
with torch.no_grad():
    for x, y in val_batches(load_corpus(preset('small')).val, 64, 4, 256): total, n = total+float(model(x, y.contiguous())[1])*len(x), n+len(x)
print(json.dumps(total/n))
'''


def ng_flags(name, eval_iters=1, **more):
    "What nanoGPT is told in every part."
    told = dict(SHAPES[name], dataset='lmnb_bench', device='cpu', compile=False, eval_iters=eval_iters, block_size=256, gradient_accumulation_steps=1, **more)
    return [f'--{k}={v}' for k, v in told.items()]


def nanogpt(checkout, folder, name, rate, steps, seed, every=None):
    "Seconds of its steps, the validation loss and its own curve, by nanoGPT's script; only its seed is written into a copy."
    every = every or steps
    script, out = checkout/f'train_seed{seed}.py', folder/f'ng-{name}-{rate}-{steps}-{seed}'
    source = (checkout/'train.py').read_text()
    assert 'torch.manual_seed(1337 + seed_offset)' in source
    script.write_text(source.replace('torch.manual_seed(1337 + seed_offset)', f'torch.manual_seed({seed})'))
    flags = ng_flags(name, 1 if every == steps else 64//SHAPES[name]['batch_size'], eval_interval=every, max_iters=steps, lr_decay_iters=steps, learning_rate=rate, min_lr=float(rate)/10,
                     warmup_iters=100, beta2=.99, out_dir=out)
    said = run(sys.executable, script.name, *flags, cwd=checkout)
    dts = {int(i): float(t)/1e3 for i, t in re.findall(r'iter (\d+): loss [\d.]+, time ([\d.]+)ms', said)}
    took = [dts[i] for i in range(steps) if i % every]  # the others hold an evaluation
    curve = {int(i): float(loss) for i, loss in re.findall(r'step (\d+): train loss [\d.]+, val loss ([\d.]+)', said)}
    return dict(seconds=sum(took)*steps/len(took), loss=child(sys.executable, JUDGE, checkout, out/'ckpt.pt'), curve=curve)


def lmnb(folder, name, steps, seed, *sets, every=10**6):
    "Seconds of its steps, by the clock of its events, and the validation losses."
    out = folder/f'lmnb-{name}-{steps}-{seed}-{"-".join(sets)}'
    run(*LMNB, '--quiet', '--new-run', '--config', name, '--max-steps', steps, '--seed', seed, '--eval-interval', every, '--save-interval', 10**6,
        '--checkpoint-dir', out, '--set', 'save_minutes=0', 'log_interval=1', *sets)
    events = [json.loads(line) for line in (out/'metrics.jsonl').read_text().splitlines()]
    train = {e['step']: e for e in events if e['kind'] == 'train'}
    ends = [0, *sorted(train)]                          # an event's rate is the mean of the steps since the one before
    took = [train[k]['dt_ms']/1e3*(k-j) for j, k in zip(ends, ends[1:])]
    val = {e['step']: e['loss'] for e in events if e['kind'] == 'val'}
    return dict(seconds=sum(took), loss=val[steps], curve=val)


def losses(kept, checkout, folder):
    print('\n## Seconds to the same loss\n')
    print('nanoGPT: its `train.py`, AdamW, cosine to a tenth, 100 steps of warm-up, `beta2=0.99` (its CPU and character recipes), the best of three rates by the '
          'first seed. Both: fp32, the same shape and tokens a step; seconds are those of the steps, without evaluation, saves and start. '
          'Passed: the loss is at most nanoGPT\'s mean.\n')
    print('| shape | program | steps | validation loss, each seed | seconds | of nanoGPT |\n|---|---|---|---|---|---|', flush=True)
    for name, steps in NG_STEPS.items():
        tried = {r: kept(f'ng {name} {r} {steps} 1337', lambda: nanogpt(checkout, folder, name, r, steps, 1337)) for r in RATES}
        best = min(tried, key=lambda r: tried[r]['loss'])
        theirs, ours = [tried[best]], []
        for seed in (0, 1, 2):                          # in turn
            n = OURS_STEPS[name]
            ours.append(kept(f'lmnb {name} {n} {seed}', lambda: lmnb(folder, name, n, seed)))
            if seed in NG_SEEDS: theirs.append(kept(f'ng {name} {best} {steps} {seed}', lambda: nanogpt(checkout, folder, name, best, steps, seed)))
        goal, base = statistics.mean(t['loss'] for t in theirs), statistics.median(t['seconds'] for t in theirs)
        def each(runs): return ', '.join(format(r['loss'], '.3f') for r in runs)
        def took(runs): return [r['seconds'] for r in runs]
        for r in RATES:
            if r != best: print(f'| {name} | nanoGPT, lr {r} | {steps} | {each([tried[r]])} | | |')
        print(f'| {name} | nanoGPT, lr {best} | {steps} | {each(theirs)} (mean {goal:.3f}) | {spread(took(theirs), ".0f")} | 1 |')
        passed = sum(o['loss'] <= goal for o in ours)
        print(f'| {name} | lmnb | {OURS_STEPS[name]} | {each(ours)} ({passed} of 3 passed) | {spread(took(ours), ".0f")} | '
              f'**{spread([t/base for t in took(ours)])}** |', flush=True)


def long(kept, checkout, folder, steps=2000):
    every = steps//4
    print(f'\n## Long runs\n\n{steps:,} steps with each program\'s own plan for that length, one seed: validation loss (seconds of steps until there, '
          'by the median step of the table above: these runs may be made beside other work, which changes no loss). On the way lmnb is judged on its own windows, nanoGPT on as many random ones, as it does; at the end both on the same.\n')
    print('| shape | program |' + ''.join(f' step {k:,} |' for k in range(every, steps+1, every)) + '\n|---|---|---|---|---|---|', flush=True)
    for name in SHAPES:
        step_s = {p: statistics.median(kept.all[f'{p} {name} {rest} {seed}']['seconds']/n for seed in seeds) for p, rest, n, seeds in (
            ('ng', f'1e-3 {NG_STEPS[name]}', NG_STEPS[name], (1337, *NG_SEEDS)), ('lmnb', OURS_STEPS[name], OURS_STEPS[name], (0, 1, 2)))}
        found = {'nanoGPT, lr 1e-3': kept(f'ng {name} 1e-3 {steps} 1337', lambda: nanogpt(checkout, folder, name, '1e-3', steps, 1337, every)),
                 'lmnb': kept(f'lmnb {name} {steps} 0', lambda: lmnb(folder, name, steps, 0, every=every))}
        for (program, run), dt in zip(found.items(), step_s.values()):
            curve = {**{int(k): loss for k, loss in run['curve'].items()}, steps: run['loss']}
            print(f'| {name} | {program} | ' + ' | '.join(f'{curve[k]:.3f} ({dt*k:.0f})' for k in range(every, steps+1, every)) + ' |', flush=True)


# Steps

STEP = '''
import json, statistics, sys, time, torch
checkout, program, name, shape, mode, n, compiled = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4]), sys.argv[5], int(sys.argv[6]), sys.argv[7] == '1'
B, T, V = shape.pop('batch_size'), 256, 8192
ids = torch.randint(V, (400*B*T+1,), generator=torch.Generator().manual_seed(0))
def batch(k): i = k % 400*B*T; return ids[i:i+B*T].view(B, T), ids[i+1:i+B*T+1].view(B, T)
def timed(f, n):
    f(0); f(1)
    ts = []
    for k in range(n): t0 = time.perf_counter(); f(k); ts.append(time.perf_counter()-t0)
    return statistics.median(ts)
if program == 'nanoGPT' or program == 'Lightning':
    sys.path.insert(0, checkout)
    import contextlib, io
    from model import GPT, GPTConfig
    with contextlib.redirect_stdout(io.StringIO()):
        model = GPT(GPTConfig(block_size=T, vocab_size=V, dropout=0., bias=False, **shape))
        opt = model.configure_optimizers(.1, 1e-3, (.9, .99), 'cpu')
    forward = torch.compile(model) if compiled else model
    loss_of = lambda x, y: forward(x, y)[1]
elif program == 'HF':
    from transformers import Qwen3Config, Qwen3ForCausalLM
    C, H = shape['n_embd'], shape['n_head']
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=V, hidden_size=C, intermediate_size=-(-8*C//3//8)*8, num_hidden_layers=shape['n_layer'], num_attention_heads=H,
                             num_key_value_heads=H, head_dim=C//H, max_position_embeddings=T, tie_word_embeddings=True, use_cache=False, attn_implementation='sdpa'))
    forward = torch.compile(model) if compiled else model
    loss_of = lambda x, y: forward(input_ids=x, labels=x).loss
else:
    import os, tempfile
    from lmnb.config import preset
    from lmnb.engine import Engine
    e = Engine(preset(name, optimizer='muon' if mode == 'muon' else 'adamw', compile=compiled), note=lambda line: None)
    model, loss_of = e.model, e.forward
    step = lambda k: e.train_step(k+1, 1e-3)
def passes(k):
    for p in model.parameters(): p.grad = None
    loss_of(*batch(k)).backward()
def plain(k):
    loss = loss_of(*batch(k)); loss.backward(); torch.nn.utils.clip_grad_norm_(model.parameters(), 1.); opt.step(); opt.zero_grad(set_to_none=True); loss.item()
if mode == 'passes': s = timed(passes, n)
elif program == 'lmnb': s = timed(step, n)
elif program == 'nanoGPT': s = timed(plain, n)
elif program == 'HF':
    from transformers import Trainer, TrainerCallback, TrainingArguments
    import tempfile
    class Data(torch.utils.data.Dataset):
        def __len__(self): return 400*B
        def __getitem__(self, i): x = ids[i*T:(i+1)*T]; return dict(input_ids=x, labels=x)
    ends = []
    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kw): ends.append(time.perf_counter())
    args = TrainingArguments(tempfile.mkdtemp(), per_device_train_batch_size=B, max_steps=n+2, optim='adamw_torch_fused', use_cpu=True, report_to=[], save_strategy='no',
                             logging_steps=10**6, disable_tqdm=True, bf16=mode == 'bf16', torch_compile=compiled, max_grad_norm=1.)
    Trainer(model=model, args=args, train_dataset=Data(), callbacks=[Clock()]).train()
    s = statistics.median(b-a for a, b in zip(ends[1:], ends[2:]))
elif program == 'Lightning':
    import lightning, logging, warnings
    warnings.filterwarnings('ignore'); logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)
    ends = []
    class Module(lightning.LightningModule):
        def __init__(self): super().__init__(); self.model = model
        def training_step(self, b, i): return loss_of(b[:, :-1].contiguous(), b[:, 1:].contiguous())
        def configure_optimizers(self): return torch.optim.AdamW(self.model.parameters(), 1e-3, (.9, .99), fused=mode != 'bf16') # with bf16 it refuses to clip
        def on_train_batch_end(self, *args): ends.append(time.perf_counter())
    rows = ids[:400*B*(T)].view(-1, T); rows = torch.cat((rows, rows[:, :1]), 1)
    t = lightning.Trainer(accelerator='cpu', max_steps=n+2, precision='bf16-mixed' if mode == 'bf16' else '32-true', gradient_clip_val=1., logger=False,
                          enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    t.fit(Module(), torch.utils.data.DataLoader(rows, batch_size=B))
    s = statistics.median(b-a for a, b in zip(ends[1:], ends[2:]))
print(); print(json.dumps(s))
'''
WAYS = {  # what: (programs, mode, compiled)
    'forward and backward, eager': (('lmnb', 'nanoGPT', 'HF'), 'passes', 0),
    'forward and backward, compiled': (('lmnb', 'nanoGPT', 'HF'), 'passes', 1),
    'a step with AdamW, eager': (('lmnb', 'nanoGPT', 'HF', 'Lightning'), 'step', 0),
    'a step with AdamW, compiled': (('lmnb', 'nanoGPT'), 'step', 1),
    'a step with Muon, eager': (('lmnb',), 'muon', 0),
    'a step with Muon, compiled': (('lmnb',), 'muon', 1),
    'a step with AdamW, bf16': (('HF', 'Lightning'), 'bf16', 0)}


def steps(kept, checkout, folder, rounds=3):
    from lmnb.check import peak_flops
    from lmnb.config import preset
    from lmnb.model import flops_per_token
    python, found = peers(folder), {}
    for r in range(rounds):
        for name, shape in SHAPES.items():
            for what, (programs, mode, compiled) in WAYS.items():
                for p in programs:
                    n = (40 if name == 'small' else 8)
                    python_ = sys.executable if p in ('lmnb', 'nanoGPT') else python
                    s = kept(f'step {r} {name} {what} {p}', lambda: child(python_, STEP, checkout, p, name, json.dumps(shape), mode, n, compiled))
                    found.setdefault((name, what, p), []).append(s)
    peak = peak_flops('cpu', 'off')
    print('\n## Steps\n')
    print(f'Medians of {rounds} rounds in turn, each program in a process of its own: tokens/s, and the share that the model\'s FLOPs are of the {peak/1e9:.0f} GFLOP/s that a '
          'product of 2,048-wide matrices reaches in fp32. HF is its Qwen3 of the same shape under its `Trainer` with the fused AdamW; Lightning trains nanoGPT\'s model '
          'with the fused AdamW; nanoGPT has its own loop. lmnb\'s steps hold all that `Engine.train_step` does.\n')
    print('| shape | what | program | tokens/s | of the peak | lmnb / it |\n|---|---|---|---|---|---|')
    for (name, what, p), ts in found.items():
        c, rates = preset(name), [SHAPES[name]['batch_size']*256/s for s in ts]
        ours = found.get((name, what, 'lmnb')) or found[name, 'a step with AdamW, eager', 'lmnb']
        versus = '' if p == 'lmnb' else spread([b/a for a, b in zip(ours, ts)])
        print(f'| {name} | {what} | {p} | {spread(rates, ".0f")} | {statistics.median(rates)*flops_per_token(c)/peak:.0%} | {versus} |')
    for name in SHAPES:
        a, m = (found[name, f'a step with {o}, eager', 'lmnb'] for o in ('AdamW', 'Muon'))
        print(f'\nWhat Muon adds at `{name}`: a step takes {spread([y/x for x, y in zip(a, m)])} of AdamW\'s.', end='')
    print(flush=True)


SHARE = '''
import json, sys, tempfile, time
from lmnb.config import preset
from lmnb.engine import Engine
from lmnb.trainer import Trainer
name, n = sys.argv[1], int(sys.argv[2])
inside, ends = [], []
def timed(f):
    def g(*a):
        t0 = time.perf_counter(); r = f(*a); inside.append(time.perf_counter()-t0); return r
    return g
Engine._gradients, Engine._update = timed(Engine._gradients), timed(Engine._update)
step = Engine.train_step
def whole(self, k, lr): ends.append(time.perf_counter()); return step(self, k, lr)
Engine.train_step = whole
with tempfile.TemporaryDirectory() as d:
    Trainer(preset(name, max_steps=n, cooldown_frac=0., save_interval=10**6, eval_interval=10**6, save_minutes=0.), d, quiet=True).fit()
k = n//5                                                # steps to get warm
print(); print(json.dumps(1-sum(inside[2*k:2*(n-1)])/(ends[n-1]-ends[k])))
'''


def share(kept, checkout, folder, rounds=3):
    print('\n## Share of a step outside forward, backward, clipping and update\n\nIn `Trainer.fit`, from one step\'s beginning to the next\'s: batches, events, display, looking for a wish to stop.\n')
    print('| shape | share |\n|---|---|')
    for name, n in (('small', 200), ('medium', 30)):
        found = [kept(f'share {r} {name}', lambda: child(sys.executable, SHARE, name, n)) for r in range(rounds)]
        print(f'| {name} | {spread(found, ".2%")} |', flush=True)


def basics(kept, checkout, folder):
    sys.path.insert(0, str(HERE))
    import basics
    print('\n## Beside `import torch` and a plain loop\n')
    basics.main(3)


# Around the loop

def until(command, path, seen, cwd=None):
    "Seconds from spawn until a file, or what the program prints, holds a text."
    t0 = time.perf_counter()
    p = subprocess.Popen([str(c) for c in command], cwd=cwd, stdout=subprocess.PIPE if path is None else subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                         env=dict(os.environ, PYTHONUNBUFFERED='1'))
    if path is None:
        for line in p.stdout:
            if seen in line: break
    else:
        while not (path.exists() and seen in path.read_bytes()):
            if p.poll() is not None: raise RuntimeError('ended before its first step')
            time.sleep(.005)
    took = time.perf_counter()-t0
    p.kill(); p.wait()
    return took


def starts(kept, checkout, folder, rounds=5):
    def once(r):
        with tempfile.TemporaryDirectory() as d:
            d = Path(d)
            def ng(**more): return [sys.executable, 'train.py', *ng_flags('small', out_dir=d/'ng', **more)]
            run(*ng(eval_interval=20, max_iters=20), cwd=checkout)
            run(*LMNB, '--quiet', '--config', 'small', '--max-steps', 20, '--checkpoint-dir', d/'old', '--set', 'eval_batches=1')
            first = until([*LMNB, '--config', 'small', '--checkpoint-dir', d/'new'], d/'new/metrics.jsonl', b'"kind":"train"')
            theirs = until(ng(eval_interval=10**6, max_iters=40), None, b'iter 0:', checkout)
            again = until([*LMNB, '--resume', 'latest', '--extend-steps', 2000, '--checkpoint-dir', d/'old'], d/'old/metrics.jsonl', b'"step":21,')
            theirs2 = until(ng(eval_interval=10**6, max_iters=40, init_from='resume'), None, b'iter 20:', checkout)
            return first, theirs, again, theirs2
    found = [kept(f'start {r}', lambda: once(r)) for r in range(rounds+1)][1:]
    a, b, c, d = zip(*found)
    print('\n## Start\n\n`small`, data cached, from spawn to the first finished step; nanoGPT evaluates one batch before it, as it always does.\n')
    print('| what | lmnb | nanoGPT | ratio |\n|---|---|---|---|')
    for what, x, y in (('spawn to first step', a, b), ('resume to first step', c, d)):
        print(f'| {what} | {spread(x)} s | {spread(y)} s | {spread([i/j for i, j in zip(x, y)])} |', flush=True)


PEAK = '''
import re, runpy, sys
from pathlib import Path
program, *args = sys.argv[1:]
sys.argv = ['x', *args]
sys.path.insert(0, '.')
try: runpy.run_path('train.py', run_name='__main__') if program == 'nanoGPT' else __import__('lmnb.cli').cli.train()
except SystemExit: pass
print(); print(int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])/1024)
'''


def memory(kept, checkout, folder, rounds=3):
    print('\n## Peak memory\n\n`medium`, 20 steps with a save every five, each program as it is; the process\'s own high-water mark.\n')
    print('| program | MiB | of nanoGPT |\n|---|---|---|')
    found = {}
    for r in range(rounds):
        flags = ng_flags('medium', eval_interval=5, always_save_checkpoint=True, max_iters=20, out_dir=folder/'ng-memory')
        with tempfile.TemporaryDirectory() as d:
            def ours(o): return last(run(sys.executable, '-c', PEAK, 'lmnb', '--quiet', '--config', 'medium', '--max-steps', 20, '--save-interval', 5, '--eval-interval', 5,
                                         '--checkpoint-dir', f'{d}/{o}', '--set', f'optimizer={o}', 'eval_batches=1'))
            def theirs(): return last(run(sys.executable, '-c', PEAK, 'nanoGPT', *flags, cwd=checkout))
            for name, make in (('lmnb, muon', lambda: ours('muon')), ('lmnb, adamw', lambda: ours('adamw')), ('nanoGPT', theirs)):
                found.setdefault(name, []).append(kept(f'memory {r} {name}', make))
    for name, xs in found.items(): print(f'| {name} | {spread(xs, ".0f")} | {spread([x/y for x, y in zip(xs, found["nanoGPT"])])} |', flush=True)


FAR = '''
import json, sys, time
import lmnb.data
from lmnb.trainer import Trainer
took, inner = [], lmnb.data._bin_ids
def timed(*a): t0 = time.perf_counter(); r = inner(*a); took.append(time.perf_counter()-t0); return r
lmnb.data._bin_ids = timed
t0 = time.perf_counter()
Trainer.resume('latest', sys.argv[1], extend_steps=int(sys.argv[2])+1, quiet=True).fit()
print(); print(json.dumps([time.perf_counter()-t0, sum(took)]))
'''


def far(kept, checkout, folder, rounds=3):
    "A resume at step 1,000,000, with the whole history, beside one at step 1,000, on the same 10 GB of ids."
    sys.path.insert(0, str(HERE))
    import far_run
    data, found = far_run.corpus(folder/'far-data', 10**10), {}
    for n in (1_000, 1_000_000):
        if not (folder/f'far{n}').exists(): far_run.make(folder/f'far{n}', n, data)
    for r in range(rounds+1):
        for n in (1_000, 1_000_000):
            found.setdefault(n, []).append(kept(f'far {r} {n}', lambda: child(sys.executable, FAR, folder/f'far{n}', n+r)))
    a, b = ([t for t in found[n][1:]] for n in found)
    print('\n## A resume far out\n\nThe import of torch is outside; one more step, and the save of it, inside. Most of both is the fingerprint: 10 GB are read whole to say '
          'that the data are the same.\n\n| step | seconds | of it the fingerprint |\n|---|---|---|')
    for n in found: print(f'| {n:,} | {spread([t for t, _ in found[n][1:]])} | {spread([h for _, h in found[n][1:]])} |')
    print(f'\nStep 1,000,000 / step 1,000: {spread([x/y for (x, _), (y, _) in zip(b, a)])}; without the fingerprint {spread([(x-g)/(y-h) for (x, g), (y, h) in zip(b, a)])}.', flush=True)


ENCODE = '''
import json, sys, time
from pathlib import Path
from lmnb.data import as_tokenizer, documents, find_files, fingerprint, token_file
source, tokenizer, mode, cache = sys.argv[1:]
text = Path(tokenizer).read_text()
files, _ = find_files(source)
t0 = time.perf_counter()
if mode == 'alone':
    pieces = [p for p in documents(files) if p]
    n = sum(len(e.ids) for e in as_tokenizer(text).encode_batch_fast(pieces, add_special_tokens=False))
else: n = len(token_file(Path(cache), fingerprint(documents(files))[0], text, lambda: documents(files)))
print(); print(json.dumps([n, time.perf_counter()-t0]))
'''


def encode(kept, checkout, folder, rounds=3, megabytes=30):
    from lmnb.config import preset
    from lmnb.data import documents, load_corpus, stdlib_files
    (folder/'tok.json').write_text(load_corpus(preset('small')).tokenizer)
    with open(folder/'text.txt', 'w', encoding='utf-8') as f:
        while f.tell() < megabytes*10**6: f.writelines(p or '\n' for p in documents(stdlib_files()))
    found = {}
    for r in range(rounds):
        for mode in ('alone', 'lmnb'):
            with tempfile.TemporaryDirectory() as d:
                found.setdefault(mode, []).append(kept(f'encode {r} {mode}', lambda: child(sys.executable, ENCODE, folder/'text.txt', folder/'tok.json', mode, d)))
    a, b = ([s for _, s in found[m]] for m in ('alone', 'lmnb'))
    print(f'\n## Encoding\n\n{megabytes} MB of text: `tokenizers` alone, all text and ids in memory, beside lmnb, which streams them to a checked file.\n')
    print(f'| what | seconds | speed of `tokenizers` alone |\n|---|---|---|\n| `tokenizers` | {spread(a)} | 1 |\n| lmnb | {spread(b)} | {spread([x/y for x, y in zip(a, b)])} |', flush=True)


PARTS = dict(steps=steps, share=share, memory=memory, start=starts, encode=encode, far=far, basics=basics, loss=losses, long=long)


def main(checkout, folder=None, *parts):
    import torch
    from lmnb.engine import bf16_gain, device_name, has_bf16
    checkout, folder = Path(checkout).resolve(), Path(folder or tempfile.mkdtemp()).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    commit = run('git', 'rev-parse', '--short', 'HEAD', cwd=HERE).strip()
    theirs = run(peers(folder), '-c', 'import lightning, transformers; print("transformers", transformers.__version__ + ", Lightning", lightning.__version__)').strip()
    ids, held_out = prepare(checkout)
    print(f'Commit {commit}, {time.strftime("%d %B %Y")}, {device_name("cpu")}, {os.cpu_count()} cores; bf16 products {bf16_gain(384):.2f} times as fast as fp32 '
          f'(instructions: {"yes" if has_bf16("cpu") else "no"}); torch {torch.__version__}, Python {platform.python_version()}, {theirs}; '
          f'{ids:,} ids to train on. Medians (least–most).', flush=True)
    kept = Kept(folder/'results.json')
    for part in parts or PARTS: PARTS[part](kept, checkout, folder)


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, lambda *a: sys.exit(143))
    main(*sys.argv[1:])
