"""Trainings one after the other, in processes that came together once: torchrun --nproc-per-node=N tests/many.py JOBS.json

A job is `{"parallel": …, "dir": …}` with either a `config` to begin with or a file to `resume`.
"""
import json
import sys

from lmnb import Trainer, preset
from lmnb.parallel import disband

for job in json.load(open(sys.argv[1])):
    how = dict(quiet=True, parallel=job['parallel'])
    if 'resume' in job: t = Trainer.resume(job['resume'], job['dir'], **how)
    else: t = Trainer(preset('small', **job['config']), job['dir'], **how)
    t.fit()
disband()
