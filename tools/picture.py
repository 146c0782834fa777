"""Makes nbs/images/panel.png and panel.gif: the panel in JupyterLab while a run of `small` that had ended is extended.

From its trunk to 1,000 steps, every frame a photograph. About six minutes."""
import io
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


class Film:
    "Photographs of one thing in a page, and how long each is to be seen."
    def __init__(self, locator): self.locator, self.frames, self.ms = locator, [], []

    def shoot(self, ms=150):
        self.frames.append(Image.open(io.BytesIO(self.locator.screenshot())).convert('RGB'))
        self.ms.append(ms)

    def save(self, out):
        "As a GIF, its colours those of three frames put together: what does not change costs nothing then."
        size = tuple(map(max, zip(*(f.size for f in self.frames))))
        frames = [Image.new('RGB', size, 'white') for _ in self.frames]
        for f, shot in zip(frames, self.frames): f.paste(shot)
        three = Image.new('RGB', (size[0], 3*size[1]))
        for i in range(3): three.paste(frames[i*(len(frames)-1)//2], (0, i*size[1]))
        colours = three.quantize(64)
        first, *rest = (f.quantize(palette=colours, dither=Image.Dither.NONE) for f in frames)
        first.save(out, save_all=True, append_images=rest, duration=self.ms, loop=0)


def prepare(folder):
    "A run that has ended, and a notebook with the panel."
    train(folder, '--config', 'small', '--max-steps', '300', '--save-interval', '100', '--eval-interval', '50',
          '--checkpoint-dir', 'checkpoints/stdlib-small')
    cell = dict(cell_type='code', source=CODE, metadata={}, outputs=[], execution_count=None)
    kernel = dict(name='python3', display_name='Python 3', language='python')
    nb = dict(cells=[cell], metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=4)
    (folder/'panel.ipynb').write_text(json.dumps(nb))


def extend(panel, film):
    "Type where from and how far, look at what that means, press, answer."
    panel.says('.lm-head', 'Finished')
    panel.pictures(1)
    film.shoot(1500)
    for field, text in (('.lm-from', 'trunk'), ('.lm-to', '1000')):
        box = panel[f'{field} input']
        box.click()
        box.press('Control+a')
        for key in text:
            box.press(key)
            panel.page.wait_for_timeout(700)
            film.shoot()
    panel.says('.lm-resume', 'go to 1,000')
    panel.page.wait_for_timeout(3000)  # the curve to come is drawn
    film.shoot(2500)
    panel['.lm-resume'].click()
    expect(panel['.lm-aside']).to_be_visible()
    film.shoot(1500)
    panel['.lm-aside'].click()


def watch(panel, film, out):
    "A photograph for every thirty steps; the one past the middle is the picture."
    panel.says('.lm-head', 'Running at', s=60)
    def step(): return int(panel['.lm-bar'].get_attribute('aria-valuenow') or 0)
    for n in range(270, 960, 30):
        lab.until(lambda: step() >= n or 'Finished' in panel['.lm-head'].text_content(), 300)
        panel.pictures(2)
        film.shoot()
        if 560 < n < 600: film.frames[-1].quantize(128).save(out, optimize=True)
    panel.says('.lm-head', 'Finished', s=300)
    panel.page.wait_for_timeout(6000)
    film.shoot(3000)


def picture(folder, images):
    prepare(folder)
    with lab.serve(folder, 'jupyter', 'lab') as address, lab.chromium() as browser:
        nb = lab.Notebook(browser.new_page(), address, 'panel.ipynb')
        nb.command('application:toggle-left-area')
        nb.run(0)
        panel, film = lab.Panel(nb.page, nb), Film(nb.page.locator('.lmnb'))
        try:
            extend(panel, film)
            watch(panel, film, images/'panel.png')
        finally: lab.kill_trainings(folder/'checkpoints')
    film.save(images/'panel.gif')
    for p in (images/'panel.png', images/'panel.gif'): print(f'{p.name}: {p.stat().st_size/1e3:.0f} kB')
    return film


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as d: picture(Path(d), ROOT/'nbs/images')
