"""BEiT-3 base, the released architecture: attention and norms per modality, sub-LN, no fusion expert. How the released
weights were pretrained was not published beyond their data (LAION-400M, LAION-2B-en, COYO-700M, CC15M); the paper's
settings stand in."""

from pretrain.models.multiway.sizes import BEIT3_BASE_RELEASED
from pretrain.recipes import _beit3

RECIPE = _beit3.recipe("beit3_base_released", BEIT3_BASE_RELEASED)
