"""BEiT-3 giant, the paper's architecture: attention shared, fusion experts in the top three layers."""

from pretrain.models.multiway.sizes import BEIT3_GIANT
from pretrain.recipes import _beit3

RECIPE = _beit3.recipe("beit3_giant", BEIT3_GIANT)
