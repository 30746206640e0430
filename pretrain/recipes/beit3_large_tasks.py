"""Fine-tuning of the released BEiT-3 large on ImageNet, VQAv2, NLVR2, SNLI-VE, COCO retrieval and COCO captions."""

from pretrain.models.multiway.sizes import BEIT3_LARGE_RELEASED
from pretrain.recipes._beit3_tasks import LARGE, recipe

RECIPE = recipe("beit3_large_tasks", BEIT3_LARGE_RELEASED, LARGE)
