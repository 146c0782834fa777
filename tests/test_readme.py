"The README is the index, and its commands are the ones that CI runs."
import subprocess
import sys
from pathlib import Path

root = Path(__file__).parent.parent


def test_readme_is_not_stale():
    assert subprocess.run([sys.executable, 'tools/readme.py', '--check'], cwd=root).returncode == 0


def test_links_lead_somewhere():
    import re
    text = (root/'README.md').read_text(encoding='utf-8')
    for link in re.findall(r'\]\(([^)#]+)\)', text):
        assert '://' in link or (root/link).exists(), link


def test_the_two_commands():
    def command(n): return subprocess.run([sys.executable, 'tools/readme.py', '--command', str(n)], cwd=root, capture_output=True, text=True).stdout
    assert 'lmnb-train --config small --max-steps 300 --save-interval 100' in command(1)
    assert 'nbdev_test' in command(2) and 'pytest' in command(2)
    assert all(len(command(n).strip().splitlines()) == 1 for n in (1, 2))


def test_the_troubles_of_the_guide():
    "Each message of its last table is one that a module says, and leads to a heading."
    import json
    import re
    cells = json.loads((root/'nbs/guides/when_something_goes_wrong.ipynb').read_text(encoding='utf-8'))['cells']
    text = [''.join(c['source']) for c in cells if c['cell_type'] == 'markdown']
    said = ' '.join(p.read_text(encoding='utf-8') for p in (root/'lmnb').glob('*.py'))
    said = re.sub(r"'\s*\n\s*f?'", '', said)  # messages over two lines
    rows = re.findall(r'^\| (.+) \| (.+) \|$', next(t for t in text if t.startswith('## From the message')), re.M)[1:]
    heads = {h.replace(' ', '-') for t in text for h in re.findall(r'^## (.+)$', t, re.M)}
    assert len(rows) > 20
    for message, to in rows:
        for part in (p.strip(' :;()') for m in re.findall('`([^`]+)`', message) for p in m.split('…')): assert part in said, part
        for link in re.findall(r'\]\(#([^)]+)\)', to): assert link in heads, link


def test_guides_have_outputs_and_show_no_path_of_the_machine():
    import json
    import re
    for p in (root/'nbs/guides').glob('*.ipynb'):
        outputs = [c['outputs'] for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
        assert any(outputs) and not re.search(r'/(tmp|home|Users)/|"error"', json.dumps(outputs)), p
