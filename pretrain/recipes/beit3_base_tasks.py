"""Fine-tuning of the released BEiT-3 base on ImageNet, VQAv2, NLVR2, SNLI-VE, COCO retrieval and COCO captions."""

from pretrain.models.multiway.sizes import BEIT3_BASE_RELEASED
from pretrain.recipes._beit3_tasks import BASE, recipe

RECIPE = recipe("beit3_base_tasks", BEIT3_BASE_RELEASED, BASE)
