"""Make a run that stands at a far step, with the history it would have, without training that long."""
import json
import time
from pathlib import Path

import numpy as np

from lmnb.config import preset
from lmnb.data import load_corpus
from lmnb.history import keep_record
from lmnb.rundir import step_name
from lmnb.trainer import Trainer


def corpus(folder, size):
    "A folder with `size` bytes of ids (a sparse file of zeros: it costs no disk) and a tokenizer."
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder/'train.bin', 'wb') as f: f.truncate(size)
    np.zeros(10**5, np.uint16).tofile(folder/'val.bin')
    (folder/'tokenizer.json').write_text(load_corpus(preset('small')).tokenizer)
    return folder


def make(folder, step, data):
    "A run of `small` in `folder` whose only checkpoint is that of `step`."
    config = preset('small', data=str(data), tokenizer=str(data/'tokenizer.json'), max_steps=2*step, save_minutes=0., eval_batches=1)
    t = Trainer(config, folder, quiet=True)
    t.step = step
    segment, lines, now = t.lineage[-1], [], time.time()
    for k in range(10, step+1, 10):
        record = dict(step=k, loss=5., lr=4e-3, grad_norm=.5)
        keep_record(t.train_history, record, config.log_interval)
        event = dict(schema=1, kind='train', time=now, run_id=segment['run_id'], segment=segment['id'], **record, tokens=k*512, tok_per_s=9e3, dt_ms=60.)
        lines.append(json.dumps(event, separators=(',', ':')))
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder)/'metrics.jsonl').write_text('\n'.join(lines)+'\n')
    t.writer.save(t.state_dict(), [step_name(step)])
    t.writer.wait()
    return len(lines)
