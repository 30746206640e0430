"""Commands that prepare data."""

from pretrain.interrupt import quiet_imports

quiet_imports()
