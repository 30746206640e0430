"""VLMo large: fusion experts in the last three layers, LayerScale 0.1, relative position bias."""

from pretrain.models.multiway.sizes import VLMO_LARGE
from pretrain.recipes import _vlmo

RECIPE = _vlmo.recipe("vlmo_large", VLMO_LARGE, lr=5e-5)
