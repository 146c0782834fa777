"Reads `settings.ini`, so that name, version and requirements stand in one place."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
url, branch = cfg['git_url'], cfg['branch']

readme = (here/'README.md').read_text(encoding='utf-8')  # a package index knows no files beside it
readme = re.sub(r'(!\[[^]]*\]\()(?!https?:|#)', rf'\1{url}/raw/{branch}/', readme)
readme = re.sub(r'(\]\()(?!https?:|#)', rf'\1{url}/blob/{branch}/', readme)

setup(
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme,
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    keywords=cfg['keywords'].split(),
    url=url,
    project_urls={'Source': url, 'Changes': f'{url}/blob/{branch}/CHANGELOG.md', 'Issues': f'{url}/issues'},
    packages=find_packages(include=['lmnb', 'lmnb.*']),
    package_data={'lmnb': ['*.css']},
    install_requires=cfg['requirements'].split(),
    extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in ('dev', 'notebook', 'hf', 'tensorboard')},
    entry_points={'console_scripts': cfg['console_scripts'].split()},
)
