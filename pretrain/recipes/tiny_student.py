"""A student of the quickstart's `retrieval`, whose blocks have less than a third of the weights: it learns by contrast
and from the teacher's vectors and their similarities in each batch. Call it with the quickstart's --run-dir.
`student_alone` is the same without a teacher, to show what the teacher is worth. Width and steps were chosen for that
corpus; they come from no paper.
"""

from __future__ import annotations

from dataclasses import replace

from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.distillation import Distillation
from pretrain.recipes import tiny

MODEL = replace(tiny.MODEL, dim=96, depth=2, heads=3, ffn_dim=384, fusion_layers=0)
# The teacher's vectors are 128 wide.
ALONE = replace(
    tiny.RETRIEVAL,
    model=MODEL,
    init_from=None,
    objectives=(Contrastive(embed_dim=tiny.MODEL.dim),),
    optim=tiny.OPTIM,
    steps=400,
)
STUDENT = replace(ALONE, objectives=(*ALONE.objectives, Distillation("retrieval", relations=1.0, features=2.0)))

RECIPE = replace(tiny.RECIPE, name="tiny_student", model=MODEL, stages={"student": STUDENT, "student_alone": ALONE})
