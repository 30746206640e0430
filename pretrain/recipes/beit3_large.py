"""BEiT-3 large, the paper's architecture: attention shared, fusion experts in the top three layers."""

from pretrain.models.multiway.sizes import BEIT3_LARGE
from pretrain.recipes import _beit3

RECIPE = _beit3.recipe("beit3_large", BEIT3_LARGE)
