"Makes nbs/images/panel.png: the panel in JupyterLab while a run of `small` is extended from its trunk. About four minutes."
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/'tests'))
from browser import lab  # noqa: E402

CODE = 'from lmnb import ResumePanel\nResumePanel("checkpoints")'


def train(cwd, *args):
    subprocess.run([sys.executable, '-m', 'lmnb.cli', 'train', '--quiet', *args], cwd=cwd, check=True)


def picture(folder, out):
    train(folder, '--config', 'small', '--max-steps', '300', '--save-interval', '100', '--eval-interval', '50',
          '--checkpoint-dir', 'checkpoints/stdlib-small')
    cell = dict(cell_type='code', source=CODE, metadata={}, outputs=[], execution_count=None)
    kernel = dict(name='python3', display_name='Python 3', language='python')
    nb = dict(cells=[cell], metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=4)
    (folder/'panel.ipynb').write_text(json.dumps(nb))
    with lab.serve(folder, 'jupyter', 'lab') as address, lab.chromium() as browser:
        nb = lab.Notebook(browser.new_page(), address, 'panel.ipynb')
        nb.command('application:toggle-left-area')
        nb.run(0)
        panel = lab.Panel(nb.page, nb)
        panel['.lm-from input'].fill('trunk')
        panel['.lm-to input'].fill('1000')
        panel['.lm-resume'].click()
        panel['.lm-aside'].click()
        panel.says('.lm-head', 'Running at', s=60)
        lab.until(lambda: int(panel['.lm-bar'].get_attribute('aria-valuenow')) > 560, 300)
        panel.pictures(2)
        expect(panel['.lm-plot']).to_be_visible()
        nb.page.locator('.lmnb').screenshot(path=out)
        panel['.lm-stop'].click()
        panel.says('.lm-head', 'Stopped')
    Image.open(out).convert('RGB').quantize(128).save(out, optimize=True)
    print(f'{out}: {out.stat().st_size/1e3:.0f} kB')


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as d: picture(Path(d), ROOT/'nbs/images/panel.png')
