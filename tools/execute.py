"Runs notebooks from top to bottom and keeps their outputs: `python tools/execute.py nbs/train.ipynb`."
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean

WIDGET = 'application/vnd.jupyter.widget-view+json'  # shows nothing where its kernel is gone


def tidy(outputs):
    "Lines that came one by one together, and no widgets."
    kept = []
    for o in outputs:
        if o.output_type == 'stream' and kept and kept[-1].get('name') == o.name: kept[-1].text += o.text
        elif WIDGET not in o.get('data', {}): kept.append(o)
    return kept


def execute(path):
    os.environ.pop('LMNB_TUTORIAL_STEPS', None)
    nb, began = nbformat.read(path, 4), time.monotonic()
    with tempfile.TemporaryDirectory() as cwd:
        os.environ['LMNB_CACHE'] = f'{cwd}/cache'  # as the first time
        where = dict(metadata=dict(path=cwd))
        NotebookClient(nb, timeout=1200, kernel_name='python3', store_widget_state=False, resources=where).execute()
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.outputs = tidy(cell.outputs)
    nbformat.write(nb, path)
    nbdev_clean(str(path))
    print(f'{path}: {time.monotonic()-began:.0f} s, {path.stat().st_size/1e3:.0f} kB')


if __name__ == '__main__':
    for arg in sys.argv[1:]: execute(Path(arg).resolve())
