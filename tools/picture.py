"Draws the README's picture from a real run: python tools/picture.py RUN_DIR"
import sys
from pathlib import Path

from lmnb import load_checkpoint, load_history
from lmnb.plots import draw_run, png
from lmnb.schedule import plan_from

run = Path(sys.argv[1])
state = load_checkpoint(run/'final_model.pt')
fig = draw_run(load_history(run), plan_from(state['config'], state['scheduler_state_dict']), dpi=150)
(Path(__file__).parent.parent/'nbs/images/run.png').write_bytes(png(fig))
