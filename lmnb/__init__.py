"Train small language models in a notebook: stop anywhere, resume exactly, extend for free."
__version__ = "0.2.0"

import importlib
import inspect

_NAMES = {
    'config': ('ExperimentConfig', 'preset'),
    'pretrained': ('preset_from',),
    'history': ('load_history',),
    'listeners': ('TensorBoard', 'CSV', 'replay'),
    'plots': ('plot_runs',),
    'checkpoint': ('load_checkpoint',),
    'rundir': ('list_checkpoints',),
    'sampling': ('sample',),
    'trainer': ('Trainer',),
    'background': ('launch', 'find_runs', 'attach', 'stop'),
    'panel': ('ResumePanel',),
}
_WHERE = {name: module for module, names in _NAMES.items() for name in names}
__all__ = list(_WHERE)


def __getattr__(name):
    "A public name, from the module that has it: `import lmnb` alone imports neither torch nor matplotlib."
    if name in ('load_checkpoint', 'Trainer', 'sample'): importlib.import_module('lmnb.model')  # torch.load opens ours
    if name in _WHERE:
        module = importlib.import_module(f'lmnb.{_WHERE[name]}')
        return globals().setdefault(name, _told(getattr(module, name)))
    raise AttributeError(f'module lmnb has no attribute {name!r}')


def _told(obj):
    "Bring into `help()` what stands beside each parameter in the source, of a class' public methods, too."
    from fastcore.docments import docments
    methods = [m for n, m in vars(obj).items() if n[0] != '_'] if inspect.isclass(obj) else []
    for f in (obj, *filter(inspect.isfunction, (getattr(m, '__func__', m) for m in methods))):
        rows = [f'{k}: {text}' for k, text in docments(f).items() if text]
        f.__doc__ = '\n'.join([f.__doc__ or '', '', *rows])  # none under -OO
    return obj


def __dir__(): return sorted([*globals(), *__all__])
