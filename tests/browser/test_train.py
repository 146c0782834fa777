"The tutorial, as somebody who has just opened it would run it."
import json

from conftest import ROOT

from . import lab


def test_run_all(notebook, tmp_path):
    content = json.loads((ROOT/'nbs'/'train.ipynb').read_text(encoding='utf-8'))
    for c in content['cells']:
        if c['cell_type'] == 'code': c.update(outputs=[], execution_count=None)  # what is there afterwards is new
    (tmp_path/'train.ipynb').write_text(json.dumps(content), encoding='utf-8')
    nb = notebook(tmp_path/'train.ipynb')
    nb.run_all()
    def errors(): return [o for _, outputs in nb.cells() for o in outputs if o['output_type'] == 'error']
    lab.until(lambda: errors() or all(n for n, _ in nb.cells()), 180)
    assert not errors()
    panel = lab.Panel(nb.page)
    plot = nb.page.locator('.jp-OutputArea-output img:not(.lm-plot)').first
    plot.scroll_into_view_if_needed()
    assert plot.evaluate('img => img.naturalWidth') > 100
    panel.says('.lm-head', ' at ')
