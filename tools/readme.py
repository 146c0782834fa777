"Writes README.md from nbs/index.ipynb; `--check` fails if it is stale, `--command N` prints its Nth shell command."
import re
import sys
from pathlib import Path

root = Path(__file__).parent.parent


def readme() -> str:
    "The index as Markdown, without outputs, its links as seen from the top folder."
    import nbformat  # not needed to print a command, which CI does before anything is installed
    from nbconvert import MarkdownExporter
    nb = nbformat.read(root/'nbs/index.ipynb', 4)
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.outputs = []
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = text.replace('](images/', '](nbs/images/')
    return re.sub(r'\n{3,}', '\n\n', text).strip()+'\n'


def command(n: int) -> str:
    "The Nth command of README.md that stands in a block marked `sh`, counted from 1."
    return re.findall(r'^```sh\n(.+?)\n```$', (root/'README.md').read_text(encoding='utf-8'), re.M | re.S)[n-1]


if __name__ == '__main__':
    if sys.argv[1:] == ['--check']:
        if (root/'README.md').read_text(encoding='utf-8') != readme(): sys.exit('README.md is stale: run python tools/readme.py')
    elif sys.argv[1:2] == ['--command']: print(command(int(sys.argv[2])))
    else: (root/'README.md').write_text(readme(), encoding='utf-8')
