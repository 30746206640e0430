"""VLMo base: fusion experts in the last two layers, LayerScale 0.1, relative position bias."""

from pretrain.models.multiway.sizes import VLMO_BASE
from pretrain.recipes import _vlmo

RECIPE = _vlmo.recipe("vlmo_base", VLMO_BASE, lr=2e-4)
